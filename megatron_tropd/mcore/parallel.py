"""The ranks of a run and the groups they form: Megatron's parallel state, read once."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.base.environment import STORE_DESCRIPTOR, number, variable
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.mcore import platform

_TIMEOUT_SECONDS = 2 * 3600.0
"""Ranks without an engine wait this long for a rollout, or for an evaluation on rank 0."""
_store: Any = None
"""The server of rank 0, which lives as long as the process."""


@dataclass(frozen=True)
class Ranks:
    """This process' place in the run and the process groups it belongs to."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup = field(repr=False)
    """Ranks holding the other shards of the same layers."""
    pp_group: dist.ProcessGroup = field(repr=False)
    """Ranks holding the other stages of the same replica and shard."""
    dp_group: dist.ProcessGroup = field(repr=False)
    """Ranks holding the same weights for other data."""
    mp_group: dist.ProcessGroup = field(repr=False)
    """All tensor and pipeline ranks of this replica."""
    embedding_group: dist.ProcessGroup | None = field(repr=False)
    """First and last stage of this shard, which share tied embeddings; None elsewhere."""
    ep_size: int = 1
    """Neighbours that share the experts; 1: each has them all."""
    etp_size: int = 1
    """Tensor-parallel ranks of each expert: all of them, or 1. Neighbours are then replicas, or
    single ranks."""

    @property
    def ep_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.ep_rank_of(self.rank)

    def ep_rank_of(self, rank: int) -> int:
        """Which part of the experts a global rank holds."""
        return rank // self.etp_size % self.ep_size

    def neighbour(self, rank: int, ep_rank: int) -> int:
        """The rank that holds part ``ep_rank`` of the experts that ``rank`` shares."""
        return rank + (ep_rank - self.ep_rank_of(rank)) * self.etp_size

    def expert_shard(self) -> tuple[int, int]:
        """(number, count) of the shards of one expert; this rank's, and all."""
        return (self.tp_rank, self.tp_size) if self.etp_size > 1 else (0, 1)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, hence the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    def global_rank(self, *, tp_rank: int, pp_rank: int, dp_rank: int) -> int:
        """The rank at a place of the layout (tensor ranks are neighbours, then data, pipeline)."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, pp_rank, dp_rank) of a global rank; inverse of :meth:`global_rank`."""
        rest, tp_rank = divmod(rank, self.tp_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return tp_rank, pp_rank, dp_rank


def initialize(
    parallel: ParallelConfig, seed: int, *, timeout_seconds: float = _TIMEOUT_SECONDS
) -> Ranks:
    """Join the run: process group, Megatron's parallel state, random states.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without
    RANK it is a run of one process. An existing default process group is used as it is.

    Args:
        parallel: sizes of the axes.
        seed: of Megatron's random states (they differ between tensor ranks and stages).
        timeout_seconds: after which a collective of any group fails.

    Returns:
        this process' ranks and groups.

    Raises:
        ConfigError: the number of started processes is not tensor x pipeline x data.

    Collectives: creation of the process groups, on all ranks.
    """
    from megatron.core import parallel_state, tensor_parallel

    _join(parallel, timedelta(seconds=timeout_seconds))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.shards_of_expert,
        distributed_timeout_minutes=timeout_seconds / 60,  # made a timedelta: may be a fraction
        create_gloo_process_groups=platform.has_cuda(),
    )
    ranks = current_ranks()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * ranks.pp_rank)
    return ranks


def current_ranks() -> Ranks:
    """This process' place in Megatron's parallel state, which somebody has set up.

    Without context parallelism, and in Megatron's default order of the axes.
    """
    from megatron.core import parallel_state

    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        mp_group=parallel_state.get_model_parallel_group(),
        embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )


def shutdown() -> None:
    """Leave the run: Megatron's parallel state and every process group are destroyed."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(parallel: ParallelConfig, timeout: timedelta) -> None:
    world_size = number("WORLD_SIZE", 1)
    if dist.is_initialized():
        world_size = dist.get_world_size()
    if world_size != parallel.world_size:
        raise ConfigError(
            f"parallel.tensor x pipeline x data = {parallel.tensor} x {parallel.pipeline} x "
            f"{parallel.data} = {parallel.world_size} needs as many processes, found {world_size}. "
            "Change parallel.* or the number of processes started."
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
    dist.init_process_group(**group)


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
            "parallel.* (and rollout.num_engines) so that tensor x pipeline x data is the number "
            "of GPUs, or start on more nodes."
        )
    return here
