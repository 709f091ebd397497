"""Sequences to micro-batches: sorted by length, dealt evenly to the data-parallel ranks.

Shape suffixes: B = rows of a micro-batch, S = padded length, N = tokens of one sequence.
The same rows come out at every layout; only who holds them and how they are grouped changes, and
the loss, a sum over tokens divided by a global count, does not see the grouping.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import LossSettings
from megatron_tropd.data.batch import MicroBatch, micro_batch, row_of
from megatron_tropd.data.sequence import TokenSequence, Writer

_NO_MASK = LossSettings()


class LossCounts(NamedTuple):
    """Tokens of a step by what the loss makes of them."""

    teacher: int
    """Teacher tokens that take part in the loss."""
    student: int
    """Student tokens that take part in the loss."""
    masked: int
    """Written tokens that are left out of it."""
    golden: int = 0
    """Tokens of golden answers that take part in the loss."""

    @property
    def total(self) -> int:
        """All that take part in the loss."""
        return self.teacher + self.student + self.golden


def pack(
    sequences: Sequence[TokenSequence],
    *,
    dp_rank: int,
    dp_size: int,
    tokens_per_micro_batch: int,
    pad_multiple: int = 1,
    rounded_to: int = 1,
    batch_multiple: int = 1,
    seed: int,
    step: int,
    loss: LossSettings = _NO_MASK,
) -> list[MicroBatch]:
    """This data-parallel rank's share of a step, longest rows first.

    All ranks get equally many rows and micro-batches, and the n-th micro-batch has the same shape
    on each of them. N tokens make N - 1 positions, each predicting the next token.

    Args:
        sequences: all sequences of the step, the same list on every rank.
        dp_rank: this rank's number among the replicas.
        dp_size: number of replicas; divides the number of sequences.
        tokens_per_micro_batch: most padded positions B x S of one micro-batch on one rank.
        pad_multiple: S is a multiple of it (sequence parallelism: the tensor-parallel size).
        rounded_to: S is a multiple of it, too, unless one row would exceed the budget; so a device
            that compiles for a shape, or is fast at some, meets few of them.
        batch_multiple: the number of micro-batches is a multiple of it, as an interleaved pipeline
            asks.
        seed: ``train.seed``; keys the mask draws.
        step: training step; keys the mask draws.

    Returns:
        Micro-batches, ``rows`` indexing ``sequences``.

    Raises:
        ConfigError: the replicas cannot get equally many rows, one row exceeds the budget, or there
            are too few rows for ``batch_multiple``.
    """
    if len(sequences) % dp_size:
        raise ConfigError(
            f"{len(sequences)} trajectories cannot be dealt evenly to {dp_size} data-parallel "
            "ranks. Change rollout.prompts_per_step, samples_per_prompt or parallel.data."
        )
    most = tokens_per_micro_batch // pad_multiple * pad_multiple
    lengths = [
        max(
            _padded_length(t, pad_multiple),
            min(_padded_length(t, math.lcm(pad_multiple, rounded_to)), most),
        )
        for t in sequences
    ]
    if lengths and max(lengths) > tokens_per_micro_batch:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {tokens_per_micro_batch} is less than one trajectory "
            f"padded to {max(lengths)} tokens. Raise it to at least that."
        )
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    # Of all ranks together.
    groups, start = [], 0
    while start < len(order):
        stop = start + dp_size * (tokens_per_micro_batch // lengths[order[start]])
        groups.append(order[start:stop])
        start = stop
    return [
        _micro_batch(sequences, group[dp_rank::dp_size], lengths[group[0]], seed, step, loss)
        for group in _split_up(groups, batch_multiple, dp_size)
    ]


def _split_up(groups: list[list[int]], multiple: int, dp_size: int) -> list[list[int]]:
    """Halve the largest micro-batches until there are as many as a multiple."""
    while len(groups) % multiple:
        at = max(range(len(groups)), key=lambda i: len(groups[i]))
        rows = groups[at]
        if len(rows) == dp_size:
            raise ConfigError(
                f"parallel.pipeline = {multiple} with virtual stages needs a multiple of "
                f"{multiple} trajectories for each replica, found {sum(map(len, groups))} for "
                f"{dp_size} replicas. Change rollout.prompts_per_step or samples_per_prompt, or "
                "set parallel.virtual_pipeline = 1."
            )
        half = (len(rows) // dp_size + 1) // 2 * dp_size
        groups = [*groups[:at], rows[:half], rows[half:], *groups[at + 1 :]]
    return groups


def count_loss_tokens(
    sequences: Sequence[TokenSequence], loss: LossSettings = _NO_MASK
) -> LossCounts:
    """Tokens that take part in the loss, known before the forward pass.

    Returns:
        The counts; a masked token is in none of the others.

    Raises:
        ConfigError: there are golden answers, and the loss has nothing for them.
    """
    teacher = student = golden = masked = 0
    for t in sequences:
        kept_N = loss_weights(t, loss) != 0
        teacher += int((kept_N & (t.writer_N == Writer.TEACHER)).sum())
        student += int((kept_N & (t.writer_N == Writer.STUDENT)).sum())
        golden += int((kept_N & (t.writer_N == Writer.GOLDEN)).sum())
        masked += int((~kept_N & (t.writer_N != Writer.CONTEXT)).sum())
    if golden and not loss.needs.golden:
        raise ConfigError(
            f"loss.method = {loss.method_name()!r} has no loss for golden answers, found {golden} "
            "tokens of Writer.GOLDEN. Choose stable_opd, or leave these sequences out."
        )
    return LossCounts(teacher, student, masked, golden)


def loss_weights(sequence: TokenSequence, loss: LossSettings) -> NDArray[np.float32]:
    """Weigh each token: by the sequence's own weight, 0 if the settings leave it out.

    ``mask_first_ids`` leaves out the first occurrence of each of its ids among the tokens that
    are no context; ``mask_truncated`` a whole response that was cut off, its teacher
    prefix included.

    Returns:
        [N] 0 if there is no loss.
    """
    if loss.mask_truncated and sequence.finish == "length":
        return np.zeros_like(sequence.weight_N)
    weight_N = sequence.weight_N.copy()
    written_N = sequence.writer_N != Writer.CONTEXT
    for token_id in loss.mask_first_ids:
        places = np.flatnonzero(written_N & (sequence.ids_N == token_id))
        weight_N[places[:1]] = 0
    return weight_N


def _padded_length(sequence: TokenSequence, multiple: int) -> int:
    positions = max(len(sequence) - 1, 1)
    return -(-positions // multiple) * multiple


def _micro_batch(
    sequences: Sequence[TokenSequence],
    rows: Sequence[int],
    length: int,
    seed: int,
    step: int,
    loss: LossSettings,
) -> MicroBatch:
    taken = [sequences[row] for row in rows]
    made = [row_of(t, length, loss_weights(t, loss)) for t in taken]
    columns = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return micro_batch(columns, [t.key for t in taken], rows, seed=seed, step=step)
