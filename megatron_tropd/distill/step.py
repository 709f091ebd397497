"""The distillation step: one function of its parts, for the trainer, the plug-in and the tests."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.dealing import Dealing
from megatron_tropd.data.packing import LossCounts, count_loss_tokens, dealt, packed
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.distill.metrics import BadToken, groups_of
from megatron_tropd.distill.recordings import ADVANTAGE
from megatron_tropd.distill.step_loss import Record, StepLoss
from megatron_tropd.distill.step_parts import LossParts, StepParts
from megatron_tropd.distill.step_records import Examples, StepRecords
from megatron_tropd.distill.token_choices import BatchChoices, batch_choices, outcome_rewards
from megatron_tropd.losses.trouble import words
from megatron_tropd.mcore.student import NotFinite, Student, Update


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
        sequences: of the whole step, the same list on every rank.
        step: 0-based.
        example_rows: sequences whose per-token values are wanted.

    Raises:
        TrainingError: loss or gradient is not finite, or engine and trainer compute different
            models; weights and optimizer are as they were.

    Collectives: those of :func:`forward_backward`, ``StepSums.reduce`` and ``Student.update``.
    """
    parts.teacher.begin(step, sequences)
    dealing = dealt_to_replicas(parts, sequences)
    batches = micro_batches(parts, sequences, step, dealing)
    counts = count_loss_tokens(sequences, parts.loss)
    layout = parts.layout
    records = StepRecords(
        parts.device,
        counted=layout.is_last_stage and layout.tp_rank == 0,
        example_rows=example_rows,
        groups=groups_of(parts.routes, parts.tasks, sequences),
    )
    prompts = [sequence.key.prompt for sequence in sequences]
    advantages = [s.fields[ADVANTAGE] for s in sequences] if parts.loss.needs.outcomes else []
    known: dict[str, Any] = dict(prompts=prompts, advantages=advantages)
    began = time.perf_counter()
    forward_backward(parts, batches, counts, step, record=records, **known)
    with parts.clock("student"):
        totals = records.sums.reduce()
    passed = time.perf_counter() - began
    _check_finite(totals.first_bad_token, sequences, step)
    metrics = totals.metrics()
    if parts.engine_gap is not None:
        parts.engine_gap.check(metrics, sequences, step)
    with parts.clock("optimizer"):
        update = _update(parts.student, step)
    numbers = {
        "masked_tokens": counts.masked,
        "padding_share": dealing.padding_share,
        "waiting_share": _waiting_share(parts.student, passed),
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "update_skipped": int(update.skipped),
    }
    return StepResult(metrics | numbers, update, counts, records.examples)


def dealt_to_replicas(parts: StepParts, sequences: Sequence[TokenSequence]) -> Dealing:
    """Say which replica computes which of a step's sequences; the same on every rank."""
    return dealt(
        sequences,
        dp_size=parts.layout.dp_size,
        tokens_per_micro_batch=parts.tokens_per_micro_batch,
        pad_multiple=parts.pad_multiple,
        rounded_to=parts.rounded_to,
        batch_multiple=parts.batch_multiple,
        work=parts.work,
    )


def micro_batches(
    parts: StepParts, sequences: Sequence[TokenSequence], step: int, dealing: Dealing | None = None
) -> list[MicroBatch]:
    """Pack this rank's share of a step's sequences, on its device.

    Args:
        dealing: whose share it is; None: as :func:`dealt_to_replicas` says.
    """
    mine = (dealing or dealt_to_replicas(parts, sequences)).replicas[parts.layout.dp_rank]
    made = packed(sequences, mine, seed=parts.seed, step=step, loss=parts.loss)
    return [parts.layout.local(batch).to(parts.device) for batch in made]


def forward_backward(
    parts: LossParts,
    batches: Sequence[MicroBatch],
    counts: LossCounts,
    step: int,
    *,
    record: Record,
    prompts: Sequence[int] = (),
    advantages: Sequence[float] = (),
) -> list[dict[str, Tensor]]:
    """Score micro-batches with the teacher and send them through the student's schedule.

    The part of a step that knows neither sequences nor an optimizer: also for a loop that has
    micro-batches of its own and updates the weights itself. ``parts.student`` then runs that
    loop's schedule. The teacher's ``begin`` is the caller's.

    Args:
        batches: of this data-parallel rank, on its device; the same list on all its stages.
        step: 0-based, for losses that change on the way.
        record: given the per-token values of each micro-batch on the last stage; what it returns
            is the micro-batch's report.
        prompts: number of the prompt of each sequence that ``MicroBatch.rows`` counts, over all
            ranks; read only if the loss ``needs_student_pass``.
        advantages: how much better each of them was than its prompt's others; read only if the loss
            needs outcomes.

    Returns:
        What ``parts.student.forward_backward`` gives: the reports of ``record``.

    Collectives: those of the teacher, of the student's schedule and, if the loss looks at the
    whole batch first, of ``batch_choices``.
    """
    loss = parts.loss.at_step(step)
    with parts.clock("teacher"):
        signals = parts.teacher.signals(batches)
    with parts.clock("student"):
        choices = BatchChoices()
        if loss.needs_student_pass:
            choices = batch_choices(parts, loss, batches, signals, counts, prompts)
        if loss.needs.outcomes:
            choices = replace(choices, rewards=outcome_rewards(batches, advantages))
        step_loss = StepLoss(parts, loss, signals, counts, choices, record)
        return parts.student.forward_backward(batches, step_loss)


def _waiting_share(student: Student, passed: float) -> float:
    """Share of the teacher's and the student's seconds that ranks spent at the gradients' sum.

    Collectives: one all-reduce of [2] on the host.
    """
    # All have just met, and the device is done: nobody waits for this.
    seconds = torch.tensor([student.wait.seconds, passed], dtype=torch.float64)
    dist.all_reduce(seconds)
    waited, all_passed = map(float, seconds.tolist())
    return waited / all_passed


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


def _update(student: Student, step: int) -> Update:
    """Change the weights, if the gradient's norm lets it."""
    try:
        return student.update()
    except NotFinite as error:
        raise TrainingError(
            f"{error} Step {step + 1} ends here; every token's loss was finite. The weights were "
            "not updated. Lower train.lr, then resume."
        ) from None
