"""Models that are not trained: hidden states, never logits."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.losses import HiddenStatesSignal, align_output_weight, equal_bounds
from megatron_tropd.mcore import schedule
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.hidden import output_weight
from megatron_tropd.mcore.host_weights import HostWeights, Offload
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.models import build_model
from megatron_tropd.mcore.models import padded_vocab_size as padded_columns


class FrozenModel:
    """A frozen Megatron model on the student's ranks: the teacher, or its reference."""

    def __init__(
        self,
        built: DenseModel,
        *,
        vocab_size: int,
        weight_vH: Tensor | None = None,
        offload: Offload = "none",
    ) -> None:
        """Freeze it.

        Args:
            built: of ``models``.
            vocab_size: columns that are real in both models.
            weight_vH: [v, H] output layer on the student's columns, where the model's own is
                sharded otherwise (last stage).
            offload: where its weights are while it does not score.
        """
        self.chunks = tuple(chunk.eval().requires_grad_(False) for chunk in built.chunks)
        self.layout = built.layout
        self.vocab_size = vocab_size
        self.weight_vH = weight_vH
        self._on_host = None
        if offload != "none":
            self._on_host = HostWeights(self.chunks, by_layer=offload == "host_by_layer")

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[HiddenStatesSignal]:
        """The signal for the loss tokens of each micro-batch.

        Args:
            micro_batches: the student's.

        Returns:
            One signal per micro-batch on the last stage, an empty list elsewhere.

        Collectives: those of :func:`~megatron_tropd.mcore.schedule.hidden_states`.
        """
        with self.ready(len(micro_batches)):
            hidden = schedule.hidden_states(self.chunks, micro_batches)
        if not self.layout.is_last_stage:
            return []
        if self.weight_vH is None:
            self.weight_vH = output_weight(self.chunks[-1])
        return [HiddenStatesSignal(h, self.weight_vH, self.vocab_size) for h in hidden]

    def ready(self, micro_batches: int) -> AbstractContextManager[None]:
        """Have the weights on the device in a block that runs so many micro-batches."""
        if self._on_host is None:
            return nullcontext()
        return self._on_host.visiting(c for _, c in schedule.turns(self.chunks, micro_batches))


def frozen_model(
    folder: HFFolder | MegatronFolder,
    *,
    layout: Layout,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    padded_vocab_size: int,
    vocab_size: int,
    who: str = "teacher",
    options: Mapping[str, Any] | None = None,
    offload: Offload = "none",
) -> FrozenModel:
    """Build a model that scores on the student's ranks; collective.

    Args:
        folder: its architecture and weights.
        layout: this rank's place.
        parallel: sizes of the axes.
        dtype: of its parameters.
        padded_vocab_size: columns of the student's output layer, over all tensor-parallel ranks.
        vocab_size: columns that are real in all models.
        who: how messages call it.
        options: fields of Megatron's TransformerConfig that the user set.
        offload: where its weights are while it does not score.

    Returns:
        The model, known to no optimizer, DDP or checkpoint. Its output layer lies on the student's
        columns, even if the model has more.

    Collectives: those of ``build_model``; 1 all-to-all if the model has more columns.
    """
    own = max(padded_vocab_size, padded_columns(folder.config, tensor=layout.tp_size))
    built = build_model(
        folder,
        layout=layout,
        parallel=parallel,
        dtype=dtype,
        padded_vocab_size=own,
        who=who,
        options=options,
    )
    weight_vH = None
    if layout.is_last_stage and own != padded_vocab_size:
        weight_vH = align_output_weight(
            output_weight(built.module).detach(),
            have=equal_bounds(own, layout.tp_size),
            want=equal_bounds(padded_vocab_size, layout.tp_size),
            group=layout.tp_group,
        )
    return FrozenModel(built, vocab_size=vocab_size, weight_vH=weight_vH, offload=offload)
