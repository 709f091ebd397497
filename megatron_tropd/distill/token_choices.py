"""What is decided before a step: its loss, and what the whole batch says about each token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import LossConfig
from megatron_tropd.config.loss import PRESETS, preset
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.packing import count_loss_tokens
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.losses import LossTargets, TeacherSignal, token_statistics_from_hidden
from megatron_tropd.losses.selection import (
    future_mean,
    group_normalise,
    num_selected,
    top_share,
)
from megatron_tropd.losses.terms import rewards


def loss_name(loss: LossConfig) -> str:
    """The preset that a loss is, else objective/region/outlier."""
    for name in PRESETS:
        if preset(name) == loss:
            return name
    return f"{loss.objective}/{loss.region}/{loss.outlier}"


def loss_of_step(config: LossConfig, step: int) -> LossConfig:
    """The loss without ``switch_step``: the phase that ``step`` (0-based) belongs to.

    Before the switch every student token is trained and outliers get what ``outlier`` says; from
    the switch on outliers are clipped and the tokens with the largest entropy are trained.
    """
    if config.switch_step is None:
        return config
    if step < config.switch_step:
        return replace(config, switch_step=None, select="all")
    return replace(config, switch_step=None, select="student_entropy", outlier="clip")


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
    config: LossConfig,
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
    entropy_T, log_ratio_T = values_2T
    tokens = _Tokens.of(batches)
    lengths = [len(part) for part in hidden]
    selected = made = None
    if config.select == "student_entropy":
        total = count_loss_tokens(trajectories, config).student
        chosen_T = top_share(
            entropy_T,
            num_selected(config.select_share, total),
            tokens.student_T,
            keys_T=tokens.keys_T,
            # Rows and lengths of the n-th micro-batch are the same on every rank; tokens are not.
            longest=sum(batch.tokens.numel() for batch in batches),
            group=dp_group,
        )
        selected = list((chosen_T | ~tokens.student_T).split(lengths))
    if config.future != "none" or config.group_normalise:
        reward_T = _far_rewards(log_ratio_T, tokens, trajectories, config, dp_group)
        made = list(reward_T.split(lengths))
    return BatchChoices(selected, made)


def _far_rewards(
    log_ratio_T: Tensor,
    tokens: "_Tokens",
    trajectories: Sequence[TokenSequence],
    config: LossConfig,
    dp_group: dist.ProcessGroup,
) -> Tensor:
    """[T] rewards that look at later tokens and at the prompt's other samples."""
    reward_T = rewards(log_ratio_T, config)
    if config.future == "mean":
        reward_T = future_mean(
            reward_T,
            tokens.student_T,
            rows_T=tokens.own_rows_T,
            positions_T=tokens.positions_T,
            shape=tokens.shape,
        )
    if config.group_normalise:
        numbers: dict[int, int] = {}
        of_row = [numbers.setdefault(t.key.prompt, len(numbers)) for t in trajectories]
        groups_T = upload(torch.tensor(of_row), tokens.rows_T.device)[tokens.rows_T]
        reward_T = group_normalise(
            reward_T, tokens.student_T, groups_T, num_groups=len(numbers), group=dp_group
        )
    return reward_T


def _entropy_and_ratio(
    hidden_TH: Tensor,
    batch: MicroBatch,
    signal: TeacherSignal,
    output_weight_vH: Tensor,
    config: LossConfig,
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


@dataclass(frozen=True)
class _Tokens:
    """Where the loss tokens of all micro-batches of a rank come from."""

    student_T: Tensor
    """[T] bool, written by the student."""
    rows_T: Tensor
    """[T] int64 index of the trajectory in the step's list."""
    own_rows_T: Tensor
    """[T] int64 the same, counted among the rows of this rank."""
    positions_T: Tensor
    """[T] int64 index within prefix + response."""
    shape: tuple[int, int]
    """Rows of this rank, and positions of the longest."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> "_Tokens":
        """In the order of the micro-batches."""
        student = [b.of_loss_tokens(b.writers) == Writer.STUDENT for b in batches]
        positions = [b.of_loss_tokens(b.response_positions) for b in batches]
        own_rows, rows, longest = [], 0, 0
        for batch in batches:
            length = batch.tokens.shape[1]
            own_rows.append(batch.loss_at // length + rows)
            rows, longest = rows + len(batch.rows), max(longest, length)
        return cls(
            torch.cat(student),
            torch.cat([batch.loss_rows for batch in batches]),
            torch.cat(own_rows),
            torch.cat(positions),
            (rows, longest),
        )

    @property
    def keys_T(self) -> Tensor:
        """[T] int64 a number for each token that no layout changes."""
        return (self.rows_T << 32) + self.positions_T


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
