"""The loss as Megatron's schedule calls it: one micro-batch at a time, at the last stage."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.sequence import Writer
from megatron_tropd.distill.metrics import StepSums
from megatron_tropd.distill.token_choices import BatchChoices, targets_of
from megatron_tropd.losses import Method, TeacherSignal, tropd_loss_from_hidden, unrounded_gradient
from megatron_tropd.losses.selection import num_selected

EXAMPLE_VALUES = {"outlier": "outlier", "trust": "trust", "tv": "tv", "k1": "k1"}
"""Name in a trajectory dump -> per-token value of the loss."""


class StepObjective:
    """Loss function of one step; collects what the step reports.

    Called with the hidden states of each micro-batch's loss tokens and the output layer it returns
    their summed loss, which Megatron divides by the number of loss tokens of the global batch.
    """

    def __init__(
        self,
        signals: Sequence[TeacherSignal],
        *,
        config: Method,
        beta: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        counts: LossCounts,
        counted: bool,
        device: torch.device,
        choices: BatchChoices | None = None,
        example_rows: Collection[int] = (),
    ) -> None:
        """One objective per step.

        Args:
            signals: the teacher's, one per micro-batch (last stage).
            config: the loss of this step (``Method.at_step``).
            beta: weight of teacher tokens.
            vocab_size: real columns.
            group: tensor-parallel group.
            counts: loss tokens of the global batch.
            counted: whether this rank's sums count (one of each tensor-parallel group).
            device: of the sums.
            choices: of ``choices.choose``, where the loss needs it (last stage).
            example_rows: trajectories whose per-token values are kept in :attr:`examples`.
        """
        self._signals = signals
        self._loss = partial(
            tropd_loss_from_hidden,
            config=config,
            beta=beta,
            vocab_size=vocab_size,
            group=group,
            reduce_hidden_grad=False,  # the model sums it, with its own kind of parallelism
        )
        self._choices = choices or BatchChoices()
        self._weights = segment_weights(config, counts)
        self._counted = counted
        self._example_rows = frozenset(example_rows)
        self.sums = StepSums.zeros(device)
        self._kept: list[tuple[MicroBatch, dict[str, Tensor]]] = []

    def __call__(
        self, hidden_TH: Tensor, output_weight_vH: Tensor, batch: MicroBatch, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of one micro-batch and an empty report (see :attr:`sums`)."""
        weights_T = self._weights_of(batch, index)
        made = self._choices.rewards
        rewards_T = None if made is None else made[index]
        output = self._loss(
            hidden_TH,
            output_weight_vH,
            targets_of(batch, weights_T=weights_T, rewards_T=rewards_T),
            self._signals[index],
            main_grad=unrounded_gradient(output_weight_vH),
        )
        if self._counted:
            values = output.values | {"selected": (weights_T != 0).float()}
            self.sums.add(values["loss"], values, batch)
            if self._example_rows.intersection(batch.rows):
                shown = {n: values[key] for n, key in EXAMPLE_VALUES.items() if key in values}
                self._kept.append((batch, shown))
        return output.loss, {}

    def _weights_of(self, batch: MicroBatch, index: int) -> Tensor:
        """[T] float32 factor of each loss token."""
        teacher, student = self._weights
        is_teacher_T = batch.of_loss_tokens(batch.writers) == Writer.TEACHER
        weights_T = torch.where(is_teacher_T, teacher, student)
        weights_T = weights_T * batch.of_loss_tokens(batch.weights)
        selected = self._choices.selected
        return weights_T if selected is None else weights_T * selected[index]

    @property
    def examples(self) -> dict[int, dict[str, list[float | None]]]:
        """Trajectory -> name -> a value per written token; waits for the device."""
        found = {}
        for batch, shown in self._kept:
            for b in [b for b, row in enumerate(batch.rows) if row in self._example_rows]:
                # The response is what has positions, from the first token that somebody wrote.
                start = int((batch.writers[b] != Writer.CONTEXT).int().argmax())
                stop = start + 1 + int(batch.response_positions[b].max())
                carries_loss = batch.loss_mask[b][start:stop].tolist()
                mine_T = batch.loss_rows == batch.rows[b]
                found[batch.rows[b]] = {
                    name: _spread(values_T[mine_T].tolist(), carries_loss)
                    for name, values_T in shown.items()
                }
        return found


def segment_weights(config: Method, counts: LossCounts) -> tuple[float, float]:
    """Factors on (teacher, trained student) tokens that turn Megatron's denominator into ours.

    Megatron divides by N, all loss tokens. Ours is the number of tokens that are trained, known
    before the step: teacher tokens and the selected student tokens, together (``joint``) or each
    segment by itself (``separate``).

    Args:
        config: ``denominator`` and ``trained_share``.
        counts: loss tokens of the global batch.

    Returns:
        (teacher, student) factors; 1 for an empty segment.
    """
    total, trained = counts.teacher + counts.student, counts.student
    if config.trained_share is not None:
        trained = num_selected(config.trained_share, counts.student)
    if config.denominator == "joint":
        joint = total / max(counts.teacher + trained, 1) if total else 1.0
        return joint, joint
    teacher, student = (total / count if count else 1.0 for count in (counts.teacher, trained))
    return teacher, student


def _spread(values: list[float], carries_loss: list[bool]) -> list[float | None]:
    """One entry per written token, None where it carries no loss."""
    given = iter(values)
    return [next(given) if carries else None for carries in carries_loss]


def example_rows(num_samples: int, samples_per_prompt: int, wanted: int) -> list[int]:
    """One trajectory of each of the first prompts, another sample number for each in turn."""
    prompts = min(wanted, num_samples // samples_per_prompt)
    return [i * samples_per_prompt + i % samples_per_prompt for i in range(prompts)]


def gather_examples(mine: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Union of every rank's examples on rank 0, nothing elsewhere. Collectives: one gather."""
    parts: list[Any] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts, dst=0)
    return {row: values for part in parts or () for row, values in sorted(part.items())}
