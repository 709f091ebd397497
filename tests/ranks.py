"""Run a function on N gloo ranks of this machine (CPU, no GPU).

A spawn costs about ten seconds, nearly all of it imports: check many cases in one.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call ``fn(group, *args)`` on every rank, gloo initialised; an assert anywhere fails.

    Args:
        world_size: number of ranks.
        fn: module-level function (it is pickled by name).
        args: picklable arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_with_group, (world_size, store, fn, args), nprocs=world_size, join=True)


def run_with_env(world_size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call ``fn(*args)`` on every rank with torchrun's variables set and nothing initialised.

    Args:
        world_size: number of ranks.
        fn: module-level function (it is pickled by name).
        args: picklable arguments.
    """
    mp.spawn(_with_env, (world_size, free_port(), fn, args), nprocs=world_size, join=True)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _with_group(rank: int, world_size: int, store: str, fn: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        fn(dist.group.WORLD, *args)
        dist.barrier()  # nobody leaves while another still waits for it
    finally:
        dist.destroy_process_group()
    # Without the interpreter's and C++'s own clearing up: threads of torch that still run then have
    # now and then aborted a process whose checks had all passed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _with_env(rank: int, world_size: int, port: int, fn: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
