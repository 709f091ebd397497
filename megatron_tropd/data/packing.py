"""Trajectories to micro-batches: sorted by length, dealt evenly to the data-parallel ranks.

Shape suffixes: B = rows of a micro-batch, S = padded length, N = tokens of one trajectory.
The same rows come out at every layout; only who holds them and how they are grouped changes, and
the loss, a sum over tokens divided by a global count, does not see the grouping.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import LossSettings
from megatron_tropd.data.types import MicroBatch, Segment, Trajectory
from megatron_tropd.losses.draws import keyed_seed, keyed_uniform

_NO_MASK = LossSettings()


class LossCounts(NamedTuple):
    """Tokens of a step by what the loss makes of them."""

    teacher: int
    """Teacher tokens that take part in the loss."""
    student: int
    """Student tokens that take part in the loss."""
    masked: int
    """Teacher's and student's tokens that are left out of it."""


def pack(
    trajectories: Sequence[Trajectory],
    *,
    dp_rank: int,
    dp_size: int,
    tokens_per_micro_batch: int,
    pad_multiple: int = 1,
    rounded_to: int = 1,
    seed: int,
    step: int,
    loss: LossSettings = _NO_MASK,
) -> list[MicroBatch]:
    """This data-parallel rank's share of a step, longest rows first.

    All ranks get equally many rows and micro-batches, and the n-th micro-batch has the same shape
    on each of them. N tokens make N - 1 positions, each predicting the next token.

    Args:
        trajectories: all trajectories of the step, the same list on every rank.
        dp_rank: this rank's number among the replicas.
        dp_size: number of replicas; divides the number of trajectories.
        tokens_per_micro_batch: most padded positions B x S of one micro-batch on one rank.
        pad_multiple: S is a multiple of it (sequence parallelism: the tensor-parallel size).
        rounded_to: S is a multiple of it, too, unless one row would exceed the budget; so a device
            that compiles for a shape, or is fast at some, meets few of them.
        seed: ``train.seed``; keys the mask draws.
        step: training step; keys the mask draws.
        loss: says which tokens are masked.

    Returns:
        Micro-batches, ``rows`` indexing ``trajectories``.

    Raises:
        ConfigError: the replicas cannot get equally many rows, or one row exceeds the budget.
    """
    if len(trajectories) % dp_size:
        raise ConfigError(
            f"{len(trajectories)} trajectories cannot be dealt evenly to {dp_size} data-parallel "
            "ranks. Change rollout.prompts_per_step, samples_per_prompt or parallel.data."
        )
    most = tokens_per_micro_batch // pad_multiple * pad_multiple
    lengths = [
        max(
            _padded_length(t, pad_multiple),
            min(_padded_length(t, math.lcm(pad_multiple, rounded_to)), most),
        )
        for t in trajectories
    ]
    if lengths and max(lengths) > tokens_per_micro_batch:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {tokens_per_micro_batch} is less than one trajectory "
            f"padded to {max(lengths)} tokens. Raise it to at least that."
        )
    order = sorted(range(len(trajectories)), key=lambda i: (-_num_tokens(trajectories[i]), i))
    batches, start = [], 0
    while start < len(order):
        length = lengths[order[start]]
        stop = start + dp_size * (tokens_per_micro_batch // length)
        rows = order[start:stop][dp_rank::dp_size]
        batches.append(_micro_batch(trajectories, rows, length, seed, step, loss))
        start = stop
    return batches


def count_loss_tokens(
    trajectories: Sequence[Trajectory], loss: LossSettings = _NO_MASK
) -> LossCounts:
    """Tokens that take part in the loss, known before the forward pass.

    Args:
        trajectories: all trajectories of the step.
        loss: says which tokens are masked.

    Returns:
        The counts; a masked token is in none of the other two.
    """
    teacher = student = masked = 0
    for t in trajectories:
        kept_N = ~masked_tokens(t, loss)
        teacher += int(kept_N[: len(t.prefix_ids)].sum())
        student += int(kept_N[len(t.prefix_ids) :].sum())
        masked += int((~kept_N).sum())
    return LossCounts(teacher, student, masked)


def masked_tokens(trajectory: Trajectory, loss: LossSettings) -> NDArray[np.bool_]:
    """Which tokens after the prompt are left out of the loss.

    ``mask_first_ids`` leaves out the first occurrence of each of its ids, whoever wrote it;
    ``mask_truncated`` a whole response that was cut off, its teacher prefix included.

    Args:
        trajectory: prefix and response make N tokens.
        loss: the two settings.

    Returns:
        [N] true where there is no loss.
    """
    whole_ids = trajectory.prefix_ids + trajectory.response_ids
    masked_N = np.zeros(len(whole_ids), np.bool_)
    if loss.mask_truncated and trajectory.finish_reason == "length":
        masked_N[:] = True
    for token_id in loss.mask_first_ids:
        if token_id in whole_ids:
            masked_N[whole_ids.index(token_id)] = True
    return masked_N


def _num_tokens(trajectory: Trajectory) -> int:
    return len(trajectory.prompt_ids) + len(trajectory.prefix_ids) + len(trajectory.response_ids)


def _padded_length(trajectory: Trajectory, multiple: int) -> int:
    positions = max(_num_tokens(trajectory) - 1, 1)
    return -(-positions // multiple) * multiple


def _micro_batch(
    trajectories: Sequence[Trajectory],
    rows: Sequence[int],
    length: int,
    seed: int,
    step: int,
    loss: LossSettings,
) -> MicroBatch:
    shape_BS = (len(rows), length)
    ids = {name: np.zeros(shape_BS, np.int64) for name in ("tokens", "labels", "positions")}
    segments = np.full(shape_BS, int(Segment.PROMPT), np.int64)
    logprobs = np.zeros(shape_BS, np.float32)
    uniforms = np.zeros(shape_BS, np.float32)
    masked = np.zeros(shape_BS, np.bool_)
    for b, row in enumerate(rows):
        t = trajectories[row]
        whole_N = np.array(t.prompt_ids + t.prefix_ids + t.response_ids, np.int64)
        # The label at s is token s + 1, so the segments start one position early.
        first, last = len(t.prompt_ids) - 1, len(whole_N) - 1
        middle = first + len(t.prefix_ids)
        ids["tokens"][b, :last] = whole_N[:-1]
        ids["labels"][b, :last] = whole_N[1:]
        ids["positions"][b, first:last] = np.arange(last - first)
        segments[b, first:middle] = Segment.TEACHER
        segments[b, middle:last] = Segment.STUDENT
        masked[b, first:last] = masked_tokens(t, loss)
        logprobs[b, middle:last] = t.rollout_logprobs
        key = keyed_seed(t.prompt_index, t.sample_index)
        uniforms[b, first:last] = keyed_uniform(seed, step, key, np.arange(last - first))
    # Counted here, where a number costs nothing: a GPU would have to be waited for.
    loss_at = np.flatnonzero((segments != Segment.PROMPT) & ~masked)
    return MicroBatch(
        tokens=torch.from_numpy(ids["tokens"]),
        labels=torch.from_numpy(ids["labels"]),
        segments=torch.from_numpy(segments),
        position_ids=torch.arange(length).repeat(len(rows), 1),
        response_positions=torch.from_numpy(ids["positions"]),
        rollout_logprobs=torch.from_numpy(logprobs),
        uniforms=torch.from_numpy(uniforms),
        masked=torch.from_numpy(masked),
        loss_at=torch.from_numpy(loss_at),
        loss_rows=torch.from_numpy(np.array(rows, np.int64)[loss_at // length]),
        student_at=torch.from_numpy(np.flatnonzero(segments.flat[loss_at] == Segment.STUDENT)),
        rows=tuple(rows),
    )
