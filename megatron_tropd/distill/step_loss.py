"""The loss as Megatron's schedule calls it: one micro-batch at a time, at the last stage."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.sequence import Writer
from megatron_tropd.distill.step_parts import LossParts
from megatron_tropd.distill.token_choices import BatchChoices, targets_of
from megatron_tropd.losses import Method, TeacherSignal, tropd_loss_from_hidden, unrounded_gradient
from megatron_tropd.losses.selection import num_selected

Record = Callable[[dict[str, Tensor], Tensor, MicroBatch], dict[str, Tensor]]
"""(values of the loss, [T] each; factors of the tokens' losses [T]; micro-batch) -> sums to
report, as Megatron's loss function gives them."""


class StepLoss:
    """Megatron's loss function in one step.

    Called with the hidden states of each micro-batch's loss tokens and the output layer it returns
    their summed loss, which Megatron divides by the number of loss tokens of the global batch.
    """

    def __init__(
        self,
        parts: LossParts,
        loss: Method,
        signals: Sequence[TeacherSignal],
        counts: LossCounts,
        choices: BatchChoices,
        record: Record,
    ) -> None:
        """One for each step.

        Args:
            signals: the teacher's, one per micro-batch (last stage).
            choices: of ``batch_choices``, if the loss needs it.
            record: given each micro-batch's values; makes its report.
        """
        self._signals = signals
        self._loss = partial(
            tropd_loss_from_hidden,
            config=loss,
            beta=parts.beta,
            vocab_size=parts.vocab_size,
            group=parts.layout.tp_group,
            metrics=parts.metrics,
            reduce_hidden_grad=False,  # the model sums it, with its own kind of parallelism
        )
        self._golden = loss.needs.golden
        self._choices = choices
        self._weights = segment_weights(loss, counts)
        self._record = record

    def __call__(
        self, hidden_TH: Tensor, output_weight_vH: Tensor, batch: MicroBatch, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of one micro-batch and its report."""
        weights_T = self._weights_of(batch, index)
        rewards = self._choices.rewards
        output = self._loss(
            hidden_TH,
            output_weight_vH,
            targets_of(
                batch,
                weights_T=weights_T,
                rewards_T=None if rewards is None else rewards[index],
                golden=self._golden,
            ),
            self._signals[index],
            main_grad=unrounded_gradient(output_weight_vH),
        )
        return output.loss, self._record(output.values, weights_T, batch)

    def _weights_of(self, batch: MicroBatch, index: int) -> Tensor:
        """[T] float32 factor of each loss token."""
        teacher, student, golden = self._weights
        writers_T = batch.of_loss_tokens(batch.writers)
        weights_T = torch.where(writers_T == Writer.TEACHER, teacher, student)
        if self._golden:
            weights_T = torch.where(writers_T == Writer.GOLDEN, golden, weights_T)
        weights_T = weights_T * batch.of_loss_tokens(batch.weights)
        selected = self._choices.selected
        return weights_T if selected is None else weights_T * selected[index]


def segment_weights(config: Method, counts: LossCounts) -> tuple[float, float, float]:
    """Factors of tokens, by their writers, that turn Megatron's denominator into ours.

    Megatron divides by N, all loss tokens. Ours is the number of tokens that are trained, known
    before the step: teacher tokens and the selected student tokens, together (``joint``) or each
    segment by itself (``separate``). Golden answers always have a mean of their own.

    Args:
        config: ``denominator`` and ``trained_share``.

    Returns:
        Factors of teacher, trained student and golden tokens; 1 for an empty segment.
    """
    total, trained = counts.total, counts.student
    if config.trained_share is not None:
        trained = num_selected(config.trained_share, counts.student)
    apart = counts.teacher, trained, counts.golden
    teacher, student, golden = (total / count if count else 1.0 for count in apart)
    if config.denominator == "joint":
        teacher = student = total / max(counts.teacher + trained, 1) if total else 1.0
    return teacher, student, golden
