"""The distillation step: one function of its parts, for the trainer, the plug-in and the tests."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts, count_loss_tokens, pack
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.distill.metrics import BadToken
from megatron_tropd.distill.step_loss import Record, StepLoss
from megatron_tropd.distill.step_records import Examples, StepRecords
from megatron_tropd.distill.token_choices import BatchChoices, choose_tokens
from megatron_tropd.losses import Method, TeacherSignal
from megatron_tropd.losses.trouble import words
from megatron_tropd.mcore.hidden import output_weight
from megatron_tropd.mcore.parallel import Ranks
from megatron_tropd.mcore.step import LossFn, NotFinite, Update
from megatron_tropd.teacher import TeacherSource


def untimed(phase: str) -> AbstractContextManager[None]:
    """A clock that measures nothing."""
    return nullcontext()


class StudentPasses(Protocol):
    """The student as far as gradients go; ``mcore.step.Student`` is one."""

    @property
    def model(self) -> Any:
        """This rank's part of it, whose output layer a loss may look at before the step."""

    def score(self, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor]:
        """Give the hidden states of the loss tokens, no gradient; see ``Student.score``."""

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn
    ) -> list[dict[str, Tensor]]:
        """Add up the gradients; see ``Student.forward_backward``."""


class TrainedStudent(StudentPasses, Protocol):
    """And with an optimizer."""

    def update(self) -> Update:
        """Change the weights; see ``Student.update``."""


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """What the gradients of a step are made with, on every rank."""

    student: StudentPasses
    teacher: TeacherSource
    loss: Method
    """Of the run; ``at_step`` makes it that of a step."""
    beta: float
    """Weight of tokens that the teacher wrote."""
    vocab_size: int
    """Columns that are real in both models."""
    ranks: Ranks
    metrics: bool = True
    """Whether to compute per-token values that the loss does not need."""
    clock: Callable[[str], AbstractContextManager[None]] = untimed
    """Entered with the name of each phase: "teacher", "student", "optimizer"."""


@dataclass(frozen=True, kw_only=True)
class StepParts(LossParts):
    """What a whole step is made with: packing and an optimizer beside the loss."""

    student: TrainedStudent
    device: torch.device
    """Where micro-batches go."""
    tokens_per_micro_batch: int
    pad_multiple: int = 1
    """Rows are padded to a multiple of it, which sequence parallelism asks for."""
    rounded_to: int = 1
    """And of this, if they have the room (``platform.row_multiple``)."""
    seed: int
    """Keys the mask draws, with the step and the sample."""
    engine_gap: EngineGap | None = None
    """Compares engine and trainer; None: nobody does."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, equal on every rank but for the examples."""

    metrics: dict[str, Any]
    """Of the loss, the gradient and the update."""
    update: Update
    counts: LossCounts
    examples: Examples
    """Of this rank."""


def learn(
    parts: StepParts,
    sequences: Sequence[TokenSequence],
    step: int,
    *,
    example_rows: Collection[int] = (),
) -> StepResult:
    """Score with the teacher, differentiate the loss, update the student.

    Args:
        parts: of this rank.
        sequences: of the whole step, the same list on every rank.
        step: 0-based.
        example_rows: sequences whose per-token values are wanted.

    Returns:
        The step's numbers.

    Raises:
        TrainingError: loss or gradient is not finite, or engine and trainer compute different
            models; weights and optimizer are as they were.

    Collectives: those of :func:`forward_backward`, ``StepSums.reduce`` and ``Student.update``.
    """
    parts.teacher.begin(step, sequences)
    batches = micro_batches(parts, sequences, step)
    counts = count_loss_tokens(sequences, parts.loss)
    ranks = parts.ranks
    records = StepRecords(
        parts.device,
        counted=ranks.is_last_stage and ranks.tp_rank == 0,
        example_rows=example_rows,
    )
    prompts = [sequence.key.prompt for sequence in sequences]
    forward_backward(parts, batches, counts, step, record=records, prompts=prompts)
    with parts.clock("student"):
        totals = records.sums.reduce()
    _check_finite(totals.first_bad_token, sequences, step)
    metrics = totals.metrics()
    if parts.engine_gap is not None:
        parts.engine_gap.check(metrics, sequences, step)
    with parts.clock("optimizer"):
        update = _update(parts.student, step)
    numbers = {
        "masked_tokens": counts.masked,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "update_skipped": int(update.skipped),
    }
    return StepResult(metrics | numbers, update, counts, records.examples)


def micro_batches(
    parts: StepParts, sequences: Sequence[TokenSequence], step: int
) -> list[MicroBatch]:
    """Pack this rank's share of a step's sequences, on its device."""
    packed = pack(
        sequences,
        dp_rank=parts.ranks.dp_rank,
        dp_size=parts.ranks.dp_size,
        tokens_per_micro_batch=parts.tokens_per_micro_batch,
        pad_multiple=parts.pad_multiple,
        rounded_to=parts.rounded_to,
        seed=parts.seed,
        step=step,
        loss=parts.loss,
    )
    return [batch.to(parts.device) for batch in packed]


def forward_backward(
    parts: LossParts,
    batches: Sequence[MicroBatch],
    counts: LossCounts,
    step: int,
    *,
    record: Record,
    prompts: Sequence[int] = (),
) -> list[dict[str, Tensor]]:
    """Score micro-batches with the teacher and send them through the student's schedule.

    The part of a step that knows neither sequences nor an optimizer: also for a loop that has
    micro-batches of its own and updates the weights itself. ``parts.student`` then runs that
    loop's schedule. The teacher's ``begin`` is the caller's.

    Args:
        parts: of this rank.
        batches: of this data-parallel rank, on its device; the same list on all its stages.
        counts: loss tokens of the global batch.
        step: 0-based, for losses that change on the way.
        record: given the per-token values of each micro-batch on the last stage; what it returns
            is the micro-batch's report.
        prompts: number of the prompt of each sequence that ``MicroBatch.rows`` counts, over all
            ranks; read only if the loss ``needs_student_pass``.

    Returns:
        What ``parts.student.forward_backward`` gives: the reports of ``record``.

    Collectives: those of the teacher, of the student's schedule and, if the loss looks at the
    whole batch first, of ``Student.score`` and ``choose_tokens``.
    """
    loss = parts.loss.at_step(step)
    with parts.clock("teacher"):
        signals = parts.teacher.signals(batches)
    with parts.clock("student"):
        step_loss = StepLoss(
            signals,
            config=loss,
            beta=parts.beta,
            vocab_size=parts.vocab_size,
            group=parts.ranks.tp_group,
            counts=counts,
            choices=_choices(parts, batches, signals, loss, counts, prompts),
            metrics=parts.metrics,
            record=record,
        )
        return parts.student.forward_backward(batches, step_loss)


def _choices(
    parts: LossParts,
    batches: Sequence[MicroBatch],
    signals: Sequence[TeacherSignal],
    loss: Method,
    counts: LossCounts,
    prompts: Sequence[int],
) -> BatchChoices:
    if not loss.needs_student_pass:
        return BatchChoices()
    hidden = parts.student.score(batches)
    if not parts.ranks.is_last_stage:
        return BatchChoices()
    return choose_tokens(
        batches,
        signals,
        hidden,
        output_weight(parts.student.model),
        prompts=prompts,
        num_student=counts.student,
        config=loss,
        vocab_size=parts.vocab_size,
        tp_group=parts.ranks.tp_group,
        dp_group=parts.ranks.dp_group,
    )


def _check_finite(bad: BadToken | None, sequences: Sequence[TokenSequence], step: int) -> None:
    """Stop before the optimizer if a token's loss is not finite."""
    if bad is None:
        return
    t = sequences[bad.row]
    writer, place = t.writers[bad.position].name.lower(), t.prompt_length + bad.position
    raise TrainingError(
        f"The loss is not finite in step {step + 1}, trajectory {bad.row} (prompt "
        f"{t.key.prompt}, sample {t.key.sample}, {t.count(Writer.TEACHER)} teacher and "
        f"{t.count(Writer.STUDENT)} student tokens), first at its token {bad.position} (id "
        f"{t.ids_N[place]}, written by the {writer}): "
        f"{words(bad.finding)} The weights were not updated."
    )


def _update(student: TrainedStudent, step: int) -> Update:
    """Change the weights, if the gradient's norm lets it."""
    try:
        return student.update()
    except NotFinite as error:
        raise TrainingError(
            f"{error} Step {step + 1} ends here; every token's loss was finite. The weights were "
            "not updated. Lower train.lr, then resume."
        ) from None
