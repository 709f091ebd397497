"""What is decided before a step: its loss, and what the whole batch says about each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.loss import preset
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.sequence import Writer
from megatron_tropd.distill.step_parts import LossParts
from megatron_tropd.losses import HiddenStatesSignal, LossTargets, TeacherSignal, token_statistics
from megatron_tropd.losses.method import BatchFacts, Method
from megatron_tropd.mcore.hidden import output_weight
from megatron_tropd.mcore.layout import Layout

_ANY = preset("opd")
"""A loss that asks for nothing but log-probs."""


@dataclass(frozen=True)
class BatchChoices:
    """What the whole batch decides of each token before the step, per micro-batch of this rank."""

    selected: list[Tensor] | None = None
    """[T] bool each: the tokens that are trained, teacher tokens included. None: all."""
    rewards: list[Tensor] | None = None
    """[T] float32 each: ``LossTargets.rewards_T``. None: the loss makes its own."""


def batch_choices(
    parts: LossParts,
    loss: Method,
    batches: Sequence[MicroBatch],
    signals: Sequence[TeacherSignal],
    counts: LossCounts,
    prompts: Sequence[int],
) -> BatchChoices:
    """Selection and rewards that depend on the whole batch, from the student as it is.

    Args:
        signals: the teacher's, one per micro-batch (last stage).
        prompts: number of the prompt of each sequence of the step, which the batches' rows count.

    Returns:
        The choices, equal bit for bit on all tensor-parallel ranks; none before the last stage.

    Collectives: those of ``Student.score``; on the last stage those of
    ``token_statistics`` per micro-batch, 1 broadcast of [3, T] over the tensor-parallel
    group, and those of ``losses.selection`` over the group of the loss.
    """
    hidden, layout = parts.student.score(batches), parts.layout
    if not layout.is_last_stage:
        return BatchChoices()
    weight_vH, tp_group = output_weight(parts.student.module), layout.tp_group
    values_3T = torch.cat(
        [
            _entropy_ratio_and_logprob(*scored, weight_vH, loss, parts.vocab_size, tp_group)
            for scored in zip(hidden, batches, signals, strict=True)
        ],
        dim=-1,
    )
    # Round-off that differed between the ranks of one vocabulary would make them choose apart.
    dist.broadcast(values_3T, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    facts = _facts(
        values_3T, batches, prompts, counts.student, layout, parts.tokens_per_micro_batch
    )
    choices, lengths = loss.choose(facts), [len(part) for part in hidden]
    selected_T, rewards_T = choices.selected_T, choices.rewards_T
    return BatchChoices(
        None if selected_T is None else list(selected_T.split(lengths)),
        None if rewards_T is None else list(rewards_T.split(lengths)),
    )


def outcome_rewards(batches: Sequence[MicroBatch], advantages: Sequence[float]) -> list[Tensor]:
    """Give every token how much better its sequence was than the prompt's others.

    Args:
        advantages: of each sequence of the step, which the batches' rows count.

    Returns:
        [T] float32 each: ``BatchChoices.rewards``.
    """
    of_row = torch.tensor(advantages, dtype=torch.float32)
    return [upload(of_row, batch.loss_rows.device)[batch.loss_rows] for batch in batches]


def _facts(
    values_3T: Tensor,
    batches: Sequence[MicroBatch],
    prompts: Sequence[int],
    num_student: int,
    layout: Layout,
    tokens_per_micro_batch: int,
) -> BatchFacts:
    """What a method may look at: the loss tokens of all micro-batches of this rank."""
    student = [b.of_loss_tokens(b.writers) == Writer.STUDENT for b in batches]
    positions_T = torch.cat([b.of_loss_tokens(b.response_positions) for b in batches])
    rows_T = torch.cat([batch.loss_rows for batch in batches])
    own_rows, rows, longest = [], 0, 0
    for batch in batches:
        length = batch.tokens.shape[1]
        own_rows.append(batch.loss_at // length + rows)
        rows, longest = rows + len(batch.rows), max(longest, length)
    numbers: dict[int, int] = {}
    of_row = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    entropy_T, log_ratio_T, student_logprob_T = values_3T
    return BatchFacts(
        entropy_T=entropy_T,
        log_ratio_T=log_ratio_T,
        student_logprob_T=student_logprob_T,
        student_T=torch.cat(student),
        keys_T=(rows_T << 32) + positions_T,
        own_rows_T=torch.cat(own_rows),
        positions_T=positions_T,
        shape=(rows, longest * layout.cp_size),
        prompts_T=upload(torch.tensor(of_row), rows_T.device)[rows_T],
        num_prompts=len(numbers),
        num_student=num_student,
        # All replicas have as many micro-batches, each within the budget.
        longest=-(-len(batches) * tokens_per_micro_batch // layout.cp_size),
        group=layout.loss_group,
        row_group=layout.row_group,
    )


def _entropy_ratio_and_logprob(
    hidden_TH: Tensor,
    batch: MicroBatch,
    signal: TeacherSignal,
    output_weight_vH: Tensor,
    config: Method,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """[3, T] the student's entropy, log p/q and log q of the token."""
    student = HiddenStatesSignal(hidden_TH, output_weight_vH, vocab_size)
    targets = targets_of(batch, golden=config.needs.golden)
    statistics = token_statistics(student, targets, signal, config=config, group=group)
    divergences = statistics.divergences()
    if "student_entropy" not in divergences:
        # The teacher's logits are not at hand; the entropy is the student's alone.
        alone = token_statistics(student, targets_of(batch), student, config=_ANY, group=group)
        divergences = alone.divergences()
    entropy_T = divergences["student_entropy"]
    return torch.stack([entropy_T, statistics.log_ratio_T, statistics.student_logprob_T])


def targets_of(
    batch: MicroBatch,
    *,
    weights_T: Tensor | None = None,
    rewards_T: Tensor | None = None,
    golden: bool = False,
) -> LossTargets:
    """The loss tokens of a micro-batch as the loss takes them, golden ones told apart if asked."""
    writers_T = batch.of_loss_tokens(batch.writers)
    return LossTargets(
        ids_T=batch.of_loss_tokens(batch.labels),
        is_teacher_T=writers_T == Writer.TEACHER,
        uniforms_T=batch.of_loss_tokens(batch.uniforms),
        weights_T=weights_T,
        rollout_logprobs_T=batch.of_loss_tokens(batch.behaviour_logprobs),
        rewards_T=rewards_T,
        is_golden_T=writers_T == Writer.GOLDEN if golden else None,
    )
