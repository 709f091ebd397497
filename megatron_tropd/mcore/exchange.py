"""Hidden states on their way from the ranks that compute them to those that compute the loss.

A model in a layout of its own has other rows on its ranks than the student, in other micro-batches
and cut otherwise by context parallelism. Every rank tells which rows it has of either; the tokens
of a row are known from its sequence. So every rank can say who sends which token to whom, and
counts, lengths and tokens need not travel. Of ranks that hold the same states (tensor-parallel
ones), each sends to some of the receivers; a receiver that holds them itself takes its own.

What travels are the written tokens, all that can have a loss. They travel in rounds, so that a rank
holds little more than what it will keep. S = padded length of a whole row, H = hidden size.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.dealing import BatchRows
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.losses.align import all_to_all_rows
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.layout import Layout

Places = NDArray[np.int64]
ROUND_OF_STAGE = 4
"""Micro-batches for each stage of a pipeline between two exchanges: more take more memory, fewer
let stages wait."""


@dataclass(frozen=True)
class Wanted:
    """The student's micro-batches on a rank, as the others need to know them."""

    batches: tuple[BatchRows, ...]
    """Numbers of the sequences, and S."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], *, shares: int) -> Self:
        """Describe micro-batches of which a rank has one of so many ``shares``."""
        return cls(tuple(BatchRows(b.rows, b.tokens.shape[1] * shares) for b in batches))


class _Transfer(NamedTuple):
    """Tokens of a row that one rank sends to another."""

    sender: int
    receiver: int
    source: tuple[int, int]
    """Micro-batch and row of the sender."""
    positions: Places
    """In the whole row."""
    target: int
    """Micro-batch of the receiver."""
    places: Places
    """Among the written tokens of that micro-batch."""


@dataclass
class Round:
    """What a rank sends and receives once some micro-batches are scored."""

    send: Places
    """Of the states that were computed, in the order in which they are sent."""
    counts_out: list[int]
    counts_in: list[int]
    arrivals: list[tuple[int, Places, Places]] = field(default_factory=list)
    """(micro-batch of the student, which of those that arrived, places in it)."""


@dataclass(frozen=True)
class Exchange:
    """A step's exchange, as one rank sees it."""

    batches: list[MicroBatch]
    """What this rank scores, with the tokens it sends as loss tokens."""
    rounds: list[Round]
    per_round: int
    """Micro-batches that are scored in each of them."""
    expected: list[int]
    """States of each of the student's micro-batches here; none but on the last stage."""

    def states(
        self,
        score: Callable[[Sequence[MicroBatch]], list[Tensor]],
        wanted: Sequence[MicroBatch],
        *,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Score, and hand over.

        Args:
            score: hidden states of the loss tokens of some micro-batches, where they are computed.
            wanted: micro-batches of the student.
            hidden_size: H.
            dtype: of the states.

        Returns:
            [T, H] for the loss tokens of each of ``wanted`` on the student's last stage, an empty
            list elsewhere.

        Collectives: those of ``score``, and 1 all-to-all of all ranks, in each round.
        """
        device = platform.device()
        empty = torch.empty(0, hidden_size, dtype=dtype, device=device)
        found = [empty.new_empty(count, hidden_size) for count in self.expected]
        for number, part in enumerate(self.rounds):
            start = number * self.per_round
            scored = score(self.batches[start : start + self.per_round])
            sent = torch.cat([empty, *scored]).index_select(0, _on(part.send, device))
            del scored
            arrived = all_to_all_rows(sent, part.counts_out, part.counts_in, group=dist.group.WORLD)
            for target, which, places in part.arrivals:
                rows = arrived.index_select(0, _on(which, device))
                found[target].index_copy_(0, _on(places, device), rows)
        for number, batch in enumerate(wanted[: len(found)]):
            found[number] = _of_loss_tokens(found[number], batch)
        return found


def plan_exchange(
    dealt: Sequence[Sequence[BatchRows]],
    batches: Sequence[MicroBatch],
    wanted: Sequence[MicroBatch],
    sequences: Mapping[int, TokenSequence],
    *,
    scorer: Layout,
    student: Layout,
) -> Exchange:
    """Say what this rank computes for whom.

    Args:
        dealt: the scorer's micro-batches by its data-parallel ranks, equally many. If a number is
            there twice, one of the two rows is sent.
        batches: those of this rank, whole rows on the host.
        wanted: of this rank in the student's layout; it may have none.
        sequences: of all rows, by their numbers; the same on every rank.
        scorer: layout of the model that scores.
        student: layout of the student.

    Collectives: 1 all-gather of a few numbers a row, on the host.
    """
    wants = _told(Wanted.of(wanted, shares=student.cp_size))
    local = [scorer.local(batch) for batch in batches]
    written = {number: written_positions(sequences[number]) for number in sequences}
    mine = [
        transfer
        for transfer in _transfers(dealt, wants, written, scorer, student)
        if scorer.rank in (transfer.sender, transfer.receiver)
    ]
    sends, per_round = _Sends(mine, local, scorer), _per_round(scorer)
    rounds = [
        _round(mine, sends, range(start, start + per_round), scorer)
        for start in range(0, len(local), per_round)
    ]
    expected = [
        sum(len(_held(written[n], rows.length, student)) for n in rows.rows)
        for rows in wants[student.rank].batches
        if student.is_last_stage
    ]
    return Exchange(sends.batches, rounds, per_round, expected)


def written_positions(sequence: TokenSequence) -> Places:
    """Positions of a row whose next token somebody wrote, ascending."""
    return np.flatnonzero(sequence.writer_N[1:] != Writer.CONTEXT)


def cp_rank_of(positions: Places, length: int, cp_size: int) -> Places:
    """Context-parallel rank that computes each position of a row (``layout.zigzag``)."""
    if cp_size == 1:
        return np.zeros_like(positions)
    chunk = positions // (length // (2 * cp_size))
    return np.minimum(chunk, 2 * cp_size - 1 - chunk)


def _per_round(scorer: Layout) -> int:
    """Micro-batches between two exchanges: enough to keep a pipeline's stages busy."""
    return 1 if scorer.pp_size == 1 else ROUND_OF_STAGE * scorer.pp_size


def _told(mine: Wanted) -> list[Wanted]:
    """What every rank wants, by its number; collective."""
    told = [mine] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def _transfers(
    dealt: Sequence[Sequence[BatchRows]],
    wants: Sequence[Wanted],
    written: Mapping[int, Places],
    scorer: Layout,
    student: Layout,
) -> Iterator[_Transfer]:
    """All tokens that travel, or stay where they are, in the same order on every rank."""
    at, senders = _sources(dealt), _Senders(scorer)
    for receiver, wanted in enumerate(wants):
        _, pp_rank, replica = student.place(receiver)
        if pp_rank != student.pp_size - 1:
            continue
        for target, rows in enumerate(wanted.batches):
            start = 0
            for number in rows.rows:
                positions = _held(written[number], rows.length, student, replica)
                places = np.arange(start, start + len(positions))
                start += len(positions)
                dp_rank, source, length = at[number]
                owners = cp_rank_of(positions, length, scorer.cp_size)
                for cp_rank in range(scorer.cp_size):
                    part = owners == cp_rank
                    sender = senders.of(receiver, dp_rank * scorer.cp_size + cp_rank)
                    yield _Transfer(sender, receiver, source, positions[part], target, places[part])


class _Senders:
    """Who of those that hold the same states gives them to whom: the receiver itself if it can,
    else one after the other.
    """

    def __init__(self, scorer: Layout) -> None:
        """Nobody has a sender yet."""
        self._scorer = scorer
        self._chosen: dict[tuple[int, int], int] = {}
        self._turns: Counter[int] = Counter()

    def of(self, receiver: int, replica: int) -> int:
        """The rank that sends a receiver the states of a replica of the scorer's."""
        key = receiver, replica
        if key not in self._chosen:
            holders = _holders(self._scorer, replica)
            if receiver in holders:
                self._chosen[key] = receiver
            else:
                self._chosen[key] = holders[self._turns[replica] % len(holders)]
                self._turns[replica] += 1
        return self._chosen[key]


def _sources(
    dealt: Sequence[Sequence[BatchRows]],
) -> dict[int, tuple[int, tuple[int, int], int]]:
    """Sequence -> the data-parallel rank that scores it, micro-batch and row there, and S."""
    return {
        number: (dp_rank, (batch, row), rows.length)
        for dp_rank, batches in enumerate(dealt)
        for batch, rows in enumerate(batches)
        for row, number in enumerate(rows.rows)
    }


def _holders(scorer: Layout, replica: int) -> list[int]:
    """The ranks that end up with the hidden states of a replica."""
    last = scorer.pp_size - 1
    return [
        scorer.global_rank(tp_rank=tp_rank, pp_rank=last, replica=replica)
        for tp_rank in range(scorer.tp_size)
    ]


def _held(positions: Places, length: int, layout: Layout, replica: int | None = None) -> Places:
    """Those of a row's positions that a replica computes; None: this rank's."""
    cp_rank = (layout.replica if replica is None else replica) % layout.cp_size
    return positions[cp_rank_of(positions, length, layout.cp_size) == cp_rank]


class _Sends:
    """The tokens that a rank sends, each once, as loss tokens of its micro-batches."""

    def __init__(
        self, transfers: Sequence[_Transfer], local: Sequence[MicroBatch], scorer: Layout
    ) -> None:
        """``local``: this rank's part of what it scores."""
        self._scorer = scorer
        self._lengths = [batch.tokens.shape[1] for batch in local]
        wanted: list[list[Places]] = [[] for _ in local]
        for transfer in transfers:
            if transfer.sender == scorer.rank:
                wanted[transfer.source[0]].append(self._flat(transfer))
        none = np.zeros(0, np.int64)
        self._at = [np.unique(np.concatenate([none, *each])) for each in wanted]
        self.batches = [
            replace(batch, loss_at=torch.from_numpy(at))
            for batch, at in zip(local, self._at, strict=True)
        ]

    def places(self, transfer: _Transfer, batches: range) -> Places:
        """Which of the states of some micro-batches a transfer takes."""
        batch, _ = transfer.source
        before = sum(len(at) for at in self._at[batches.start : batch])
        return before + np.searchsorted(self._at[batch], self._flat(transfer))

    def _flat(self, transfer: _Transfer) -> Places:
        """Places in the rank's part of the micro-batch."""
        batch, row = transfer.source
        part, cp_size = self._lengths[batch], self._scorer.cp_size
        at = transfer.positions
        if cp_size > 1:
            chunk = part // 2
            behind = at - (2 * cp_size - 2 - self._scorer.cp_rank) * chunk
            at = np.where(at < chunk * cp_size, at - self._scorer.cp_rank * chunk, behind)
        return row * part + at


def _round(transfers: Sequence[_Transfer], sends: _Sends, batches: range, scorer: Layout) -> Round:
    """What is sent and received for some of the scorer's micro-batches."""
    me, ranks = scorer.rank, range(scorer.world_size)
    now = [transfer for transfer in transfers if transfer.source[0] in batches]
    out = [t for t in now if t.sender == me]
    arriving = sorted((t for t in now if t.receiver == me), key=lambda t: t.sender)
    send = [sends.places(t, batches) for t in sorted(out, key=lambda t: t.receiver)]
    found = Round(
        np.concatenate([np.zeros(0, np.int64), *send]),
        [sum(len(t.positions) for t in out if t.receiver == rank) for rank in ranks],
        [sum(len(t.positions) for t in arriving if t.sender == rank) for rank in ranks],
    )
    starts = np.cumsum([0, *(len(t.positions) for t in arriving)])
    for target in sorted({t.target for t in arriving}):
        which = [
            np.arange(start, start + len(t.positions))
            for t, start in zip(arriving, starts[:-1], strict=True)
            if t.target == target
        ]
        places = [t.places for t in arriving if t.target == target]
        found.arrivals.append((target, np.concatenate(which), np.concatenate(places)))
    return found


def _of_loss_tokens(states_NH: Tensor, batch: MicroBatch) -> Tensor:
    """[T, H] of the written tokens of a micro-batch those that have a loss."""
    if len(states_NH) == len(batch.loss_at):
        return states_NH
    place = (batch.writers != Writer.CONTEXT).flatten().cumsum(0) - 1
    return states_NH.index_select(0, place.index_select(0, batch.loss_at))


def _on(places: Places, device: torch.device) -> Tensor:
    return upload(torch.from_numpy(places), device)
