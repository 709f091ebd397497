"""What is decided before a step: its loss, and what the whole batch says about each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.loss import PRESETS, LossSettings, preset
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.packing import count_loss_tokens
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.distill.recordings import ADVANTAGE
from megatron_tropd.losses import LossTargets, TeacherSignal, token_statistics_from_hidden
from megatron_tropd.losses.method import BatchFacts, Method


def loss_name(loss: LossSettings) -> str:
    """The preset that a loss is, else its method."""
    for name in PRESETS:
        if preset(name) == loss:
            return name
    return loss.method_name()


@dataclass(frozen=True)
class BatchChoices:
    """What the whole batch decides of each token before the step, per micro-batch of this rank."""

    selected: list[Tensor] | None = None
    """[T] bool each: the tokens that are trained, teacher tokens included. None: all."""
    rewards: list[Tensor] | None = None
    """[T] float32 each: ``LossTargets.rewards_T``. None: the loss makes its own."""


def choose(
    batches: Sequence[MicroBatch],
    trajectories: Sequence[TokenSequence],
    signals: Sequence[TeacherSignal],
    hidden: Sequence[Tensor],
    output_weight_vH: Tensor,
    *,
    config: Method,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    dp_group: dist.ProcessGroup,
) -> BatchChoices:
    """Selection and rewards that depend on the whole batch, from the student as it is.

    Args:
        batches: of this rank.
        trajectories: of the whole step, which the batches' rows name.
        signals: the teacher's, one per micro-batch.
        hidden: [T, H] the student's, one per micro-batch.
        output_weight_vH: [v, H] this rank's shard of the student's output layer.
        config: the loss of this step.
        vocab_size: real columns.
        tp_group: ranks the vocabulary is sharded over.
        dp_group: ranks that hold the other trajectories.

    Returns:
        The choices, equal bit for bit on all ranks of ``tp_group``.

    Collectives: those of ``token_statistics_from_hidden`` per micro-batch; 1 broadcast of [2, T]
    over ``tp_group``; those of ``losses.selection`` over ``dp_group``.
    """
    values_2T = torch.cat(
        [
            _entropy_and_ratio(*parts, output_weight_vH, config, vocab_size, tp_group)
            for parts in zip(hidden, batches, signals, strict=True)
        ],
        dim=-1,
    )
    # Round-off that differed between the ranks of one vocabulary would make them choose apart.
    dist.broadcast(values_2T, src=dist.get_global_rank(tp_group, 0), group=tp_group)
    facts = _facts(values_2T, batches, trajectories, config, dp_group)
    choices, lengths = config.choose(facts), [len(part) for part in hidden]
    selected_T, rewards_T = choices.selected_T, choices.rewards_T
    return BatchChoices(
        None if selected_T is None else list(selected_T.split(lengths)),
        None if rewards_T is None else list(rewards_T.split(lengths)),
    )


def outcome_rewards(
    batches: Sequence[MicroBatch], trajectories: Sequence[TokenSequence]
) -> BatchChoices:
    """Give every token how much better its sequence was than the prompt's others.

    Args:
        batches: of this rank.
        trajectories: of the whole step, graded.
    """
    advantages = torch.tensor([t.fields[ADVANTAGE] for t in trajectories])
    return BatchChoices(
        rewards=[upload(advantages, batch.loss_rows.device)[batch.loss_rows] for batch in batches]
    )


def _facts(
    values_2T: Tensor,
    batches: Sequence[MicroBatch],
    trajectories: Sequence[TokenSequence],
    config: Method,
    dp_group: dist.ProcessGroup,
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
    of_row = [numbers.setdefault(t.key.prompt, len(numbers)) for t in trajectories]
    entropy_T, log_ratio_T = values_2T
    return BatchFacts(
        entropy_T=entropy_T,
        log_ratio_T=log_ratio_T,
        student_T=torch.cat(student),
        keys_T=(rows_T << 32) + positions_T,
        own_rows_T=torch.cat(own_rows),
        positions_T=positions_T,
        shape=(rows, longest),
        prompts_T=upload(torch.tensor(of_row), rows_T.device)[rows_T],
        num_prompts=len(numbers),
        num_student=count_loss_tokens(trajectories, config).student,
        # Rows and lengths of the n-th micro-batch are the same on every rank; tokens are not.
        longest=sum(batch.tokens.numel() for batch in batches),
        group=dp_group,
    )


def _entropy_and_ratio(
    hidden_TH: Tensor,
    batch: MicroBatch,
    signal: TeacherSignal,
    output_weight_vH: Tensor,
    config: Method,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> Tensor:
    """[2, T] the student's entropy and log p/q of the token."""
    statistics = token_statistics_from_hidden(
        hidden_TH,
        output_weight_vH,
        targets_of(batch),
        signal,
        config=config,
        vocab_size=vocab_size,
        group=group,
    )
    return torch.stack([statistics.divergences()["student_entropy"], statistics.log_ratio_T])


def targets_of(
    batch: MicroBatch, *, weights_T: Tensor | None = None, rewards_T: Tensor | None = None
) -> LossTargets:
    """The loss tokens of a micro-batch as the loss takes them."""
    return LossTargets(
        ids_T=batch.of_loss_tokens(batch.labels),
        is_teacher_T=batch.of_loss_tokens(batch.writers) == Writer.TEACHER,
        uniforms_T=batch.of_loss_tokens(batch.uniforms),
        weights_T=weights_T,
        rollout_logprobs_T=batch.of_loss_tokens(batch.behaviour_logprobs),
        rewards_T=rewards_T,
    )
