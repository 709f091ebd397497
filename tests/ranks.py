"""Run a function on N gloo ranks of this machine (CPU, no GPU).

Ranks are fresh processes, forked from a server that has done the imports and nothing else: no
group, no thread, no patch of the CPU platform, no state of an earlier test. As all forked children
of multiprocessing they end without the interpreter's clearing up (why that matters:
``megatron_tropd.launch.rank.leave``).
"""

import contextlib
import multiprocessing
import os
import queue
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = [
    "megatron_tropd.distill.loop",
    "megatron_tropd.integrations.megatron_lm",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "tests.frozen",
]
"""What most ranks import, with all that these import: torch, Megatron-Core, transformers."""
_layouts_left = 0


def run_on_ranks(world_size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call ``fn(group, *args)`` on every rank, gloo initialised; an assert anywhere fails.

    Args:
        world_size: number of ranks.
        fn: module-level function (it is pickled by name).
        args: picklable arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        _start(world_size, _with_group, store, fn, args)


def run_with_env(world_size: int, fn: Callable[..., None], *args: Any) -> None:
    """Call ``fn(*args)`` on every rank with torchrun's variables set and nothing initialised.

    Args:
        world_size: number of ranks.
        fn: module-level function (it is pickled by name).
        args: picklable arguments.
    """
    _start(world_size, _with_env, free_port(), fn, args)


def run_in_process(fn: Callable[..., None], *args: Any) -> int:
    """Call ``fn(*args)`` in a process of its own.

    Args:
        fn: module-level function (it is pickled by name).
        args: picklable arguments.

    Returns:
        The exit code; minus the signal that ended it.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(target=fn, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def save_without_manager() -> None:
    """Let Megatron's saves on this rank hand over their results without a process of their own.

    It would be a new interpreter, which imports the test's file and all that this imports.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def leave_layout() -> None:
    """Destroy Megatron's parallel state and all groups; join a new default group. Collective.

    Megatron drops its groups without destroying them, and each has threads and connections to all
    its ranks, which slow down whatever comes later.
    """
    from megatron.core import parallel_state

    global _layouts_left
    _layouts_left += 1
    rank, world_size, backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
    store = dist.PrefixStore(f"{_layouts_left}", dist.distributed_c10d._get_default_store())
    parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def share_sockets() -> None:
    """Give all gloo groups of this process that are made from now on one thread for their sockets.

    Left alone, each has its own, which looks around a hundred times a second. Megatron makes forty
    groups for a layout: where layouts follow each other, they took a quarter of a core's time.
    """
    group: Any = dist.ProcessGroupGloo
    make, device = group.__init__, group.create_default_device()

    def make_on_shared(self: Any, store: Any, rank: int, size: int, *, timeout: Any) -> None:
        options = group._Options()
        options._timeout, options._devices = timeout, [device]
        make(self, store, rank, size, options)

    group.__init__ = make_on_shared


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    It lies below those that the kernel hands out to whoever asks for any: else another test's
    process takes it before the one that it is meant for.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(lowest // 2, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def _start(world_size: int, entry: Callable[..., None], *arguments: Any) -> None:
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(
        entry, (world_size, *arguments), nprocs=world_size, start_method="forkserver"
    )


def _with_group(rank: int, world_size: int, store: str, fn: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    share_sockets()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        fn(dist.group.WORLD, *args)
        dist.barrier()  # nobody leaves while another still waits for it
    finally:
        dist.destroy_process_group()


def _with_env(rank: int, world_size: int, port: int, fn: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    share_sockets()
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
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
