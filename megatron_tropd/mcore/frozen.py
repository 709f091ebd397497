"""Models that are not trained: hidden states, never logits."""

from collections.abc import Sequence

from torch import Tensor

from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.mcore import schedule
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.hidden import Rows, output_weight


class FrozenModel:
    """A frozen Megatron model on the student's ranks: the teacher."""

    def __init__(
        self, built: DenseModel, *, vocab_size: int, weight_vH: Tensor | None = None
    ) -> None:
        """Freeze it.

        Args:
            built: of ``models``.
            vocab_size: columns that are real in both models.
            weight_vH: [v, H] output layer on the student's columns, where the model's own is
                sharded otherwise (last stage).
        """
        self.model = built.module.eval().requires_grad_(False)
        self.layout = built.layout
        self.vocab_size = vocab_size
        self.weight_vH = weight_vH

    def score(self, micro_batches: Sequence[Rows]) -> list[HiddenStatesSignal]:
        """The signal for the loss tokens of each micro-batch.

        Args:
            micro_batches: the student's.

        Returns:
            One signal per micro-batch on the last stage, an empty list elsewhere.

        Collectives: those of :func:`~megatron_tropd.mcore.schedule.hidden_states`.
        """
        hidden = schedule.hidden_states(self.model, micro_batches)
        if not self.layout.is_last_stage:
            return []
        if self.weight_vH is None:
            self.weight_vH = output_weight(self.model)
        return [HiddenStatesSignal(h, self.weight_vH, self.vocab_size) for h in hidden]
