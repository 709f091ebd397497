"""Hidden states on their way from the ranks that compute them to those that compute the loss.

A model in a layout of its own has other rows on its ranks than the student, in other micro-batches
and cut otherwise by context parallelism. Every rank tells which rows it has of either; the tokens
of a row are known from its sequence. So every rank can say who sends which token to whom, and
counts, lengths and tokens need not travel. Of ranks that hold the same states (tensor-parallel
ones), each sends to some of the receivers; a receiver that holds them itself takes its own.

A scorer on ranks of its own is one whose ranks come after the student's: the same exchange, and the
ranks of all of it are those of both.

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
ROUND_APART = 4
"""Micro-batches of a scorer on ranks of its own between two: they are scored already."""


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
    group: dist.ProcessGroup | None = None
    """All ranks that take part; None: the default group."""

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
            group = self.group or dist.group.WORLD
            arrived = all_to_all_rows(sent, part.counts_out, part.counts_in, group=group)
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
    wants = all_wants(wanted, student)
    local = [scorer.local(batch) for batch in batches]
    written = {number: written_positions(sequences[number]) for number in sequences}
    place = Place(scorer.rank, scorer.world_size)
    mine = _mine(_transfers(dealt, wants, written, scorer, student), place)
    sends = _Sends(_places_sent(mine, local, scorer, place), local, scorer)
    per_round = 1 if scorer.pp_size == 1 else ROUND_OF_STAGE * scorer.pp_size
    rounds = _rounds(mine, sends, len(local), per_round, place)
    expected = _expected(wants[student.rank], written, student)
    return Exchange(sends.batches, rounds, per_round, expected)


class Place(NamedTuple):
    """This rank among those that take part."""

    rank: int
    size: int


def send_to_others(
    dealt: Sequence[Sequence[BatchRows]],
    batches: Sequence[MicroBatch],
    wants: Sequence[Wanted],
    sequences: Mapping[int, TokenSequence],
    *,
    scorer: Layout,
    student: Layout,
    group: dist.ProcessGroup,
) -> Exchange:
    """Say what this rank, one of a scorer on ranks of its own, sends to the student's.

    Args:
        dealt: as in :func:`plan_exchange`; several dealings of a step may follow each other.
        batches: of this rank, its part of them, scored already: ``written_batch`` of each.
        wants: of the student's ranks.
        sequences: of all rows, by their numbers.
        scorer: layout of the model that scores.
        student: layout of the student, a rank of it.
        group: the student's ranks, then the scorer's.
    """
    written = {number: written_positions(sequences[number]) for number in sequences}
    place, first = Place(group.rank(), group.size()), len(wants)
    mine = _mine(_transfers(dealt, wants, written, scorer, student, first), place)
    sends = _Sends([batch.loss_at.numpy() for batch in batches], batches, scorer)
    rounds = _rounds(mine, sends, len(batches), ROUND_APART, place)
    return Exchange(list(batches), rounds, ROUND_APART, [], group)


def receive_from_others(
    dealt: Sequence[Sequence[BatchRows]],
    wants: Sequence[Wanted],
    sequences: Mapping[int, TokenSequence],
    *,
    scorer: Layout,
    student: Layout,
    group: dist.ProcessGroup,
) -> Exchange:
    """Say what this rank of the student's gets from a scorer on other ranks.

    Args as in :func:`send_to_others`.
    """
    written = {number: written_positions(sequences[number]) for number in sequences}
    place, first = Place(group.rank(), group.size()), len(wants)
    mine = _mine(_transfers(dealt, wants, written, scorer, student, first), place)
    rounds = _rounds(mine, None, len(dealt[0]), ROUND_APART, place)
    expected = _expected(wants[student.rank], written, student)
    return Exchange([], rounds, ROUND_APART, expected, group)


def written_batch(batch: MicroBatch) -> MicroBatch:
    """A rank's part of a micro-batch, with all written tokens as loss tokens."""
    written = (batch.writers != Writer.CONTEXT).flatten()
    return replace(batch, loss_at=written.nonzero().flatten())


def written_positions(sequence: TokenSequence) -> Places:
    """Positions of a row whose next token somebody wrote, ascending."""
    return np.flatnonzero(sequence.writer_N[1:] != Writer.CONTEXT)


def cp_rank_of(positions: Places, length: int, cp_size: int) -> Places:
    """Context-parallel rank that computes each position of a row (``layout.zigzag``)."""
    if cp_size == 1:
        return np.zeros_like(positions)
    chunk = positions // (length // (2 * cp_size))
    return np.minimum(chunk, 2 * cp_size - 1 - chunk)


def all_wants(wanted: Sequence[MicroBatch], student: Layout) -> list[Wanted]:
    """What every rank of the student's wants, by its number; collective."""
    return _told(Wanted.of(wanted, shares=student.cp_size))


def _told(mine: Wanted) -> list[Wanted]:
    told = [mine] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def _expected(wanted: Wanted, written: Mapping[int, Places], student: Layout) -> list[int]:
    """States of each of the student's micro-batches on a rank."""
    return [
        sum(len(_held(written[n], rows.length, student)) for n in rows.rows)
        for rows in wanted.batches
        if student.is_last_stage
    ]


def _mine(transfers: Iterator[_Transfer], place: Place) -> list[_Transfer]:
    return [t for t in transfers if place.rank in (t.sender, t.receiver)]


def _transfers(
    dealt: Sequence[Sequence[BatchRows]],
    wants: Sequence[Wanted],
    written: Mapping[int, Places],
    scorer: Layout,
    student: Layout,
    first: int = 0,
) -> Iterator[_Transfer]:
    """All tokens that travel, or stay where they are, in the same order on every rank.

    ``first``: the number of the scorer's first rank.
    """
    at, senders = _sources(dealt), _Senders(scorer, first)
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

    def __init__(self, scorer: Layout, first: int) -> None:
        """Nobody has a sender yet."""
        self._scorer, self._first = scorer, first
        self._chosen: dict[tuple[int, int], int] = {}
        self._turns: Counter[int] = Counter()

    def of(self, receiver: int, replica: int) -> int:
        """The rank that sends a receiver the states of a replica of the scorer's."""
        key = receiver, replica
        if key not in self._chosen:
            holders = [self._first + rank for rank in _holders(self._scorer, replica)]
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


def _places_sent(
    transfers: Sequence[_Transfer], local: Sequence[MicroBatch], scorer: Layout, place: Place
) -> list[Places]:
    """Places in each of a rank's micro-batches that somebody wants, each once."""
    wanted: list[list[Places]] = [[np.zeros(0, np.int64)] for _ in local]
    for transfer in transfers:
        if transfer.sender == place.rank:
            batch = transfer.source[0]
            wanted[batch].append(_flat(transfer, local[batch].tokens.shape[1], scorer))
    return [np.unique(np.concatenate(each)) for each in wanted]


class _Sends:
    """The tokens whose states a rank has, as loss tokens of its micro-batches."""

    def __init__(self, at: Sequence[Places], local: Sequence[MicroBatch], scorer: Layout) -> None:
        """Take the places ``at`` in each of ``local``, this rank's part of what it scores."""
        self._scorer, self._at = scorer, at
        self._lengths = [batch.tokens.shape[1] for batch in local]
        self.batches = [
            replace(batch, loss_at=torch.from_numpy(each))
            for batch, each in zip(local, at, strict=True)
        ]

    def places(self, transfer: _Transfer, batches: range) -> Places:
        """Which of the states of some micro-batches a transfer takes."""
        batch, _ = transfer.source
        before = sum(len(at) for at in self._at[batches.start : batch])
        flat = _flat(transfer, self._lengths[batch], self._scorer)
        return before + np.searchsorted(self._at[batch], flat)


def _flat(transfer: _Transfer, part: int, scorer: Layout) -> Places:
    """Places in the sender's part of the micro-batch, whose rows are ``part`` long."""
    at, cp_size = transfer.positions, scorer.cp_size
    if cp_size > 1:
        chunk = part // 2
        behind = at - (2 * cp_size - 2 - scorer.cp_rank) * chunk
        at = np.where(at < chunk * cp_size, at - scorer.cp_rank * chunk, behind)
    return transfer.source[1] * part + at


def _rounds(
    transfers: Sequence[_Transfer], sends: _Sends | None, batches: int, each: int, place: Place
) -> list[Round]:
    """What is sent and received, ``each`` of the scorer's micro-batches at a time."""
    return [
        _round(transfers, sends, range(start, start + each), place)
        for start in range(0, batches, each)
    ]


def _round(
    transfers: Sequence[_Transfer], sends: _Sends | None, batches: range, place: Place
) -> Round:
    """What is sent and received for some of the scorer's micro-batches."""
    me, ranks = place.rank, range(place.size)
    now = [transfer for transfer in transfers if transfer.source[0] in batches]
    out = [t for t in now if t.sender == me]
    arriving = sorted((t for t in now if t.receiver == me), key=lambda t: t.sender)
    send = []
    if sends is not None:  # None: this rank only receives
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
