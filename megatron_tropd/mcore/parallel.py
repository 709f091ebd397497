"""Joining a run and leaving it: process groups, Megatron's parallel state, random states."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.base.environment import STORE_DESCRIPTOR, number, variable
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.bridge import Bridge, Worlds, join
from megatron_tropd.mcore.layout import Layout, axis_sizes, current_layout

_TIMEOUT_SECONDS = 2 * 3600.0
"""Ranks without an engine wait this long for a rollout, or for an evaluation on rank 0."""
_store: Any = None
"""The server of rank 0, which lives as long as the process."""
_bridge: Bridge | None = None
"""To the other world of the job."""


def initialize(
    parallel: ParallelConfig,
    seed: int,
    *,
    pad_multiple: int | None = None,
    timeout_seconds: float = _TIMEOUT_SECONDS,
    worlds: Worlds | None = None,
) -> Layout:
    """Join the run: process group, Megatron's parallel state, random states.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without
    RANK it is a run of one process. An existing default process group is used as it is.

    Args:
        parallel: sizes of the axes.
        seed: of Megatron's random states (they differ between tensor ranks and stages).
        pad_multiple: of the lengths of rows (``Config.pad_multiple``); None: what the axes need.
        timeout_seconds: after which a collective of any group fails.
        worlds: whose the ranks of the job are; then the layout is that of this rank's world, and
            :func:`bridge` leads to the other. None: there is one.

    Returns:
        this process' place and groups.

    Raises:
        ConfigError: the number of started processes is not tensor x context x pipeline x data.

    Collectives: creation of the process groups, on all ranks.
    """
    from megatron.core import parallel_state, tensor_parallel

    _join(parallel, timedelta(seconds=timeout_seconds), worlds)
    parallel_state.initialize_model_parallel(
        **axis_sizes(parallel),
        distributed_timeout_minutes=timeout_seconds / 60,  # made a timedelta: may be a fraction
        create_gloo_process_groups=platform.has_cuda(),
    )
    layout = current_layout(pad_multiple=pad_multiple or parallel.row_shards)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * layout.pp_rank)
    return layout


def shutdown() -> None:
    """Leave the run: Megatron's parallel state and every process group are destroyed."""
    from megatron.core import parallel_state

    global _bridge
    _bridge = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def bridge() -> Bridge:
    """The way to the other world of this job, which has two."""
    assert _bridge is not None, "the ranks of this job are one world"
    return _bridge


def _join(parallel: ParallelConfig, timeout: timedelta, worlds: Worlds | None) -> None:
    global _bridge
    world_size = number("WORLD_SIZE", 1)
    if dist.is_initialized():
        world_size = dist.get_world_size()
    if worlds is not None:
        world_size -= worlds.size - parallel.world_size
    if world_size != parallel.world_size:
        raise ConfigError(
            f"parallel.tensor x context x pipeline x data = {parallel.tensor} x "
            f"{parallel.context} x {parallel.pipeline} x {parallel.data} = {parallel.world_size} "
            f"needs as many processes, found {world_size}. Change parallel.* or the number of "
            "processes started."
        )
    if platform.has_cuda():
        torch.cuda.set_device(_local_device())
    if dist.is_initialized():
        return
    group: dict[str, Any] = {"backend": platform.distributed_backend(), "timeout": timeout}
    if platform.has_cuda():
        # Bound to it from the start: a barrier cannot guess another rank's device.
        group["device_id"] = platform.device()
    if not variable("RANK"):
        group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    _open_store(timeout)
    if worlds is None:
        dist.init_process_group(**group)
    else:
        _bridge = join(worlds, number("RANK"), **group)


def _open_store(timeout: timedelta) -> None:
    """Serve the ranks' store on the socket that our launcher has held since it named its port."""
    global _store
    descriptor = os.environ.pop(STORE_DESCRIPTOR, None)
    if descriptor is not None:
        _store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            number("MASTER_PORT"),
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=int(descriptor),
        )


def _local_device() -> int:
    """Number of this rank's CUDA device: each rank of a node has one to itself."""
    here, available = number("LOCAL_RANK", 0), torch.cuda.device_count()
    if here >= available:
        ranks = number("LOCAL_WORLD_SIZE", here + 1)
        raise ConfigError(
            f"Expected a GPU for each of the {ranks} ranks of this node, found {available}. Lower "
            "parallel.* (and rollout.num_engines) so that tensor x context x pipeline x data is "
            "the number of GPUs, or start on more nodes."
        )
    return here
