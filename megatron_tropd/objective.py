"""The loss as Megatron's schedule calls it: one micro-batch at a time, at the last stage."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import LossConfig
from megatron_tropd.data.types import MicroBatch, Segment
from megatron_tropd.losses import LossTargets, TeacherSignal, tropd_loss
from megatron_tropd.step_metrics import StepSums

EXAMPLE_VALUES = {"outlier": "outlier", "trust": "trust", "tv": "tv", "k1": "k1"}
"""Name in a trajectory dump -> per-token value of the loss."""


class StepObjective:
    """Loss function of one step; collects what the step reports.

    Called with the logits of each micro-batch's loss tokens it returns their summed loss, which
    Megatron divides by the number of loss tokens of the global batch.
    """

    def __init__(
        self,
        signals: Sequence[TeacherSignal],
        *,
        config: LossConfig,
        beta: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        counts: tuple[int, int],
        counted: bool,
        device: torch.device,
        example_rows: Collection[int] = (),
    ) -> None:
        """One objective per step.

        Args:
            signals: the teacher's, one per micro-batch (last stage).
            config: which loss.
            beta: weight of teacher tokens.
            vocab_size: real columns.
            group: tensor-parallel group.
            counts: (teacher, student) loss tokens of the global batch.
            counted: whether this rank's sums count (one of each tensor-parallel group).
            device: of the sums.
            example_rows: trajectories whose per-token values are kept in :attr:`examples`.
        """
        self._signals = signals
        self._loss = partial(
            tropd_loss,
            config=config,
            beta=beta,
            vocab_size=vocab_size,
            group=group,
            segment_weights=segment_weights(config, counts),
        )
        self._counted = counted
        self._example_rows = frozenset(example_rows)
        self.sums = StepSums.zeros(device)
        self.examples: dict[int, dict[str, list[float]]] = {}

    def __call__(
        self, logits_Tv: Tensor, batch: MicroBatch, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of one micro-batch and an empty report (see :attr:`sums`)."""
        mask = batch.loss_mask
        targets = LossTargets(
            ids_T=batch.labels[mask],
            is_teacher_T=batch.segments[mask] == Segment.TEACHER,
            uniforms_T=batch.uniforms[mask],
        )
        output = self._loss(logits_Tv, targets, self._signals[index])
        if self._counted:
            self.sums.add(output.loss_T.detach(), output.values, batch)
            self._keep(output.values, batch)
        return output.loss_T.sum(), {}

    def _keep(self, values: dict[str, Tensor], batch: MicroBatch) -> None:
        wanted = self._example_rows.intersection(batch.rows)
        if not wanted:
            return
        row_T = batch.loss_mask.nonzero()[:, 0]
        for b, row in enumerate(batch.rows):
            if row in wanted:
                mine_T = row_T == b
                self.examples[row] = {
                    name: values[key][mine_T].tolist()
                    for name, key in EXAMPLE_VALUES.items()
                    if key in values
                }


def segment_weights(config: LossConfig, counts: tuple[int, int]) -> tuple[float, float]:
    """Factors on (teacher, student) tokens that turn the joint denominator into the asked one.

    Megatron divides by N = teacher + student tokens. ``joint`` keeps that; ``separate`` gives each
    segment the mean over its own count, so its factor is N / count.

    Args:
        config: ``denominator``.
        counts: (teacher, student) loss tokens of the global batch.

    Returns:
        (teacher, student) factors; 1 for an empty segment.
    """
    if config.denominator == "joint":
        return 1.0, 1.0
    total = sum(counts)
    teacher, student = (total / count if count else 1.0 for count in counts)
    return teacher, student


def example_rows(num_samples: int, samples_per_prompt: int, wanted: int) -> list[int]:
    """One trajectory of each of the first prompts, another sample number for each in turn."""
    prompts = min(wanted, num_samples // samples_per_prompt)
    return [i * samples_per_prompt + i % samples_per_prompt for i in range(prompts)]


def gather_examples(mine: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Union of every rank's examples. Collectives: one gather of small objects."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {row: values for part in parts for row, values in sorted(part.items())}
