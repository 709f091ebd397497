"""How a run is laid out over its ranks: what every axis means, said in one place."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.mcore import platform

CUDA_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Layout:
    """The axes, this rank's place on them, and the process groups it belongs to.

    Tensor-parallel ranks are neighbours, then come context, data and pipeline: Megatron's order.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    groups: ProcessGroupCollection = field(repr=False)
    """Megatron's, by its names."""
    cp_rank: int = 0
    cp_size: int = 1
    ep_size: int = 1
    """Neighbours that share the experts; 1: each has them all."""
    etp_size: int = 1
    """Tensor-parallel ranks of each expert: all of them, or 1. Neighbours are then replicas, or
    single ranks."""
    pad_multiple: int = 1
    """What the padded length of a row is a multiple of, so that the models can compute it."""
    vp_size: int = 1
    """Chunks of each model on this rank: virtual pipeline stages."""

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks holding the other shards of the same layers."""
        return self.groups.tp

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks holding the same weights for other rows."""
        return self.groups.dp

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """Ranks holding the same weights for other tokens: sums of the loss go over them."""
        return self.groups.dp_cp

    @property
    def row_multiple(self) -> int:
        """What lengths of rows are rounded up to, if there is room.

        On CUDA kernels are chosen, and some compiled, for each shape; products and attention are
        fast at multiples of their tiles.
        """
        return self.cp_size * CUDA_ROW_MULTIPLE if platform.has_cuda() else 1

    @property
    def row_group(self) -> dist.ProcessGroup | None:
        """Ranks holding the other tokens of this rank's rows; None: rows are whole."""
        return self.groups.cp if self.cp_size > 1 else None

    def local(self, batch: MicroBatch) -> MicroBatch:
        """The part of a micro-batch that this rank computes: all of its positions, or its share.

        Of 2 x cp_size equal chunks of each row that is the one at cp_rank and its mirror image:
        under causal attention every rank then has the same work. So Megatron's models and
        Transformer Engine expect it.
        """
        if self.cp_size == 1:
            return batch
        return batch.at(zigzag(batch.tokens.shape[1], self.cp_rank, self.cp_size))

    @property
    def ep_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.ep_rank_of(self.rank)

    def ep_rank_of(self, rank: int) -> int:
        """Which part of the experts a global rank holds."""
        return rank // self.etp_size % self.ep_size

    @property
    def replica(self) -> int:
        """This rank's number among those with the same weights, if experts are not counted."""
        return self.dp_rank * self.cp_size + self.cp_rank

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

    def chunks(self, layers: int) -> list[range]:
        """Layers of each of this rank's chunks of a model, by their numbers in the whole of it."""
        return stage_chunks(layers, self.pp_size, self.vp_size)[self.pp_rank]

    @property
    def batch_multiple(self) -> int:
        """What the number of micro-batches is a multiple of: they take turns in the chunks."""
        return self.pp_size if self.vp_size > 1 else 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    def global_rank(self, *, tp_rank: int, pp_rank: int, replica: int) -> int:
        """The rank at a place of the layout."""
        return (pp_rank * self.dp_size * self.cp_size + replica) * self.tp_size + tp_rank

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, pp_rank, replica) of a global rank; inverse of :meth:`global_rank`."""
        rest, tp_rank = divmod(rank, self.tp_size)
        pp_rank, replica = divmod(rest, self.dp_size * self.cp_size)
        return tp_rank, pp_rank, replica


def zigzag(length: int, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Positions of a row that a context-parallel rank computes, ascending.

    Args:
        length: of the row, a multiple of 2 x cp_size.
        cp_rank: the rank.
        cp_size: ranks that share the row.
    """
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return torch.cat([chunks[cp_rank], chunks[-1 - cp_rank]])


def axis_sizes(parallel: ParallelConfig) -> dict[str, int | None]:
    """Sizes of the axes by the names that Megatron's process groups and its models share."""
    virtual = parallel.virtual_pipeline
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.shards_of_expert,
    }


def layout_of(parallel: ParallelConfig, *, rank: int = 0, pad_multiple: int = 1) -> Layout:
    """A place in a layout of other processes: who has which rows there; no process groups."""
    rest, tp_rank = divmod(rank, parallel.tensor)
    pp_rank, replica = divmod(rest, parallel.replicas)
    dp_rank, cp_rank = divmod(replica, parallel.context)
    return Layout(
        rank=rank,
        world_size=parallel.world_size,
        tp_rank=tp_rank,
        tp_size=parallel.tensor,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline,
        dp_rank=dp_rank,
        dp_size=parallel.data,
        cp_rank=cp_rank,
        cp_size=parallel.context,
        groups=ProcessGroupCollection(),
        ep_size=parallel.expert,
        etp_size=parallel.shards_of_expert,
        pad_multiple=pad_multiple,
        vp_size=parallel.virtual_pipeline,
    )


def current_layout(*, pad_multiple: int = 1) -> Layout:
    """This process' place in Megatron's parallel state, which somebody has set up.

    In Megatron's default order of the axes.
    """
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        pad_multiple=pad_multiple,
        vp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )
