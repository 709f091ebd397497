"""A frozen model in a layout of its own on the student's ranks: its signal in the student's layout.

Its hidden states travel (``exchange.py``); its output layer has travelled once, after loading.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.losses.align import send_rows
from megatron_tropd.mcore import platform, schedule
from megatron_tropd.mcore.exchange import Exchange
from megatron_tropd.mcore.frozen import FrozenModel
from megatron_tropd.mcore.hidden import output_weight
from megatron_tropd.mcore.host_weights import Offload
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.models import build_model
from megatron_tropd.mcore.models import padded_vocab_size as padded_columns
from megatron_tropd.mcore.own_groups import OwnGroups


class ModelElsewhere:
    """The teacher, or its reference, in other process groups than the student."""

    def __init__(
        self,
        folder: HFFolder | MegatronFolder,
        *,
        groups: OwnGroups,
        student: Layout,
        dtype: torch.dtype,
        padded_vocab_size: int,
        vocab_size: int,
        who: str = "teacher",
        options: Mapping[str, Any] | None = None,
        offload: Offload = "none",
    ) -> None:
        """Build it; collective.

        Args:
            folder: its architecture and weights.
            groups: its layout.
            student: this rank's place in the student's.
            dtype: of its parameters.
            padded_vocab_size: columns of the student's output layer, over all tensor-parallel
                ranks.
            vocab_size: columns that are real in all models.
            who: how messages call it.
            options: fields of Megatron's TransformerConfig that the user set.
            offload: where its weights are while it does not score.

        Collectives: those of ``build_model`` and 1 all-to-all of the output layer.
        """
        self.exchange: Exchange | None = None
        """Of the micro-batches that are scored next."""
        self._groups, self._student = groups, student
        self._dtype, self._hidden_size = dtype, model_shape(folder.config).hidden
        own = padded_columns(folder.config, tensor=groups.layout.tp_size)
        with groups.current():
            built = build_model(
                folder,
                layout=groups.layout,
                parallel=groups.parallel,
                dtype=dtype,
                padded_vocab_size=own,
                who=who,
                options=options,
            )
        self._weight_vH = self._output_layer(built.module, own, padded_vocab_size)
        self._frozen = FrozenModel(built, vocab_size=vocab_size, offload=offload)

    @property
    def chunks(self) -> Sequence[Any]:
        """This rank's part of the model: one chunk."""
        return self._frozen.chunks

    def score(self, wanted: Sequence[MicroBatch]) -> list[HiddenStatesSignal]:
        """The signal for the loss tokens of the student's micro-batches.

        Args:
            wanted: those that ``exchange`` was planned for.

        Returns:
            One signal per micro-batch on the student's last stage, an empty list elsewhere.

        Collectives: those of ``Exchange.states``.
        """
        assert self.exchange is not None, "nothing was planned"
        with self._frozen.ready(len(self.exchange.batches)), torch.no_grad():
            states = self.exchange.states(
                self._states, wanted, hidden_size=self._hidden_size, dtype=self._dtype
            )
        size = self._frozen.vocab_size
        return [HiddenStatesSignal(hidden, self._weight_vH, size) for hidden in states]

    def _states(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        with self._groups.current():
            return schedule.hidden_states(self.chunks, batches)

    @torch.no_grad()
    def _output_layer(self, module: Any, own: int, wanted: int) -> Tensor:
        """[v, H] the student's columns on its last stage, no rows elsewhere.

        The model's own shard is given up: of its output layer nothing but its place is run.
        """
        layout, student = self._groups.layout, self._student
        have = [columns_of(layout, rank, own) for rank in range(layout.world_size)]
        want = [columns_of(student, rank, wanted) for rank in range(layout.world_size)]
        weight_vH = torch.empty(0, self._hidden_size, dtype=self._dtype, device=platform.device())
        if layout.is_last_stage:
            weight_vH = output_weight(module).detach()
        aligned = send_rows(weight_vH, have=have, want=want, group=dist.group.WORLD)
        if layout.is_last_stage:
            # A tied model that has its embedding on this stage has no weight here anyway.
            module.output_layer.weight = None
        return aligned


def columns_of(layout: Layout, rank: int, padded: int) -> slice:
    """Columns of an output layer that a rank holds; none before the last stage."""
    tp_rank, pp_rank, _ = layout.place(rank)
    if pp_rank != layout.pp_size - 1:
        return slice(0, 0)
    share = padded // layout.tp_size
    return slice(tp_rank * share, (tp_rank + 1) * share)


@torch.no_grad()
def output_layer_across(
    weight_vH: Tensor | None,
    config: dict[str, Any],
    *,
    scorer: Layout,
    student: Layout,
    padded_vocab_size: int,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> Tensor:
    """Send the output layer of a model on ranks of its own to the student's last stage.

    Args:
        weight_vH: this rank's shard of it; None: it has none.
        config: the model's config.json.
        scorer: a place in its layout.
        student: a place in the student's layout.
        padded_vocab_size: columns of the student's output layer.
        dtype: of the weights.
        group: the student's ranks, then the model's.

    Returns:
        [v, H] this rank's columns of the student's last stage, no rows elsewhere.

    Collectives: 1 all-to-all over ``group``.
    """
    hidden = model_shape(config).hidden
    own = padded_columns(config, tensor=scorer.tp_size)
    nothing = slice(0, 0)
    students, scorers = range(student.world_size), range(scorer.world_size)
    want = [columns_of(student, rank, padded_vocab_size) for rank in students]
    have = [columns_of(scorer, rank, own) for rank in scorers]
    if weight_vH is None:
        weight_vH = torch.empty(0, hidden, dtype=dtype, device=platform.device())
    return send_rows(
        weight_vH,
        have=[nothing] * len(want) + have,
        want=want + [nothing] * len(have),
        group=group,
    )
