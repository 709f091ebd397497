"""Sequences to micro-batches: of about one length each, dealt to the data-parallel ranks by work.

Shape suffixes: B = rows of a micro-batch, S = padded length, N = tokens of one sequence.
The same rows come out at every layout; only who holds them and how they are grouped changes, and
the loss, a sum over tokens divided by a global count, does not see the grouping.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import LossSettings
from megatron_tropd.data.batch import MicroBatch, micro_batch, row_of
from megatron_tropd.data.dealing import BatchRows, Dealing, Work, deal
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


def dealt(
    sequences: Sequence[TokenSequence],
    *,
    dp_size: int,
    tokens_per_micro_batch: int,
    pad_multiple: int = 1,
    rounded_to: int = 1,
    batch_multiple: int = 1,
    work: Work = float,
) -> Dealing:
    """Say which sequences make a micro-batch and which replica computes it; the same everywhere.

    N tokens make N - 1 positions, each predicting the next token.

    Args:
        sequences: all sequences of the step, the same list on every rank.
        dp_size: number of replicas; divides the number of sequences.
        tokens_per_micro_batch: most padded positions B x S of one micro-batch on one rank.
        pad_multiple: S is a multiple of it (sequence parallelism: the tensor-parallel size).
        rounded_to: S is a multiple of it, too, unless one row would exceed the budget; so a device
            that compiles for a shape, or is fast at some, meets few of them.
        batch_multiple: a replica's number of micro-batches is a multiple of it.
        work: of a row of some padded length.

    Raises:
        ConfigError: the sequences cannot be dealt, or one row exceeds the budget.
    """
    if len(sequences) % dp_size:
        raise ConfigError(
            f"{len(sequences)} trajectories cannot be dealt evenly to {dp_size} data-parallel "
            "ranks. Change rollout.prompts_per_step, samples_per_prompt or parallel.data."
        )
    lengths = [max(len(t) - 1, 1) for t in sequences]
    most = tokens_per_micro_batch // pad_multiple * pad_multiple
    rounded = math.lcm(pad_multiple, rounded_to)
    padded = [max(_up(n, pad_multiple), min(_up(n, rounded), most)) for n in lengths]
    if padded and max(padded) > tokens_per_micro_batch:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {tokens_per_micro_batch} is less than one trajectory "
            f"padded to {max(padded)} tokens. Raise it to at least that."
        )
    return deal(
        lengths,
        padded,
        dp_size=dp_size,
        tokens_per_micro_batch=tokens_per_micro_batch,
        batch_multiple=batch_multiple,
        work=work,
    )


def packed(
    sequences: Sequence[TokenSequence],
    batches: Sequence[BatchRows],
    *,
    seed: int,
    step: int,
    loss: LossSettings = _NO_MASK,
) -> list[MicroBatch]:
    """Make a replica's micro-batches, ``rows`` indexing ``sequences``.

    Args:
        sequences: all sequences of the step.
        batches: of the replica, as they were dealt.
        seed: ``train.seed``; keys the mask draws.
        step: training step; keys the mask draws.
    """
    return [_micro_batch(sequences, *batch, seed, step, loss) for batch in batches]


def pack(
    sequences: Sequence[TokenSequence],
    *,
    dp_rank: int,
    seed: int,
    step: int,
    loss: LossSettings = _NO_MASK,
    **how: Any,
) -> list[MicroBatch]:
    """Deal a step's sequences (:func:`dealt`, ``how``) and make one replica's micro-batches."""
    return packed(
        sequences, dealt(sequences, **how).replicas[dp_rank], seed=seed, step=step, loss=loss
    )


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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
