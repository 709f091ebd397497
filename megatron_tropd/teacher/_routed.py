"""Teachers that do not read the student's rows: several of them, or one with prompts of its own.

Each teacher is given its own sequences, packed for it alone, and what it says is put back in the
order of the student's tokens. Slots = response tokens of a rank's sequences, one after the other;
T = loss tokens of a micro-batch, N = tokens of a sequence.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import Config
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.packing import pack
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.losses import (
    FullSignal,
    ReferencedSignal,
    ReferencedTopKSignal,
    RoutedSignal,
    TeacherSignal,
    TopKSignal,
    reduce_signal,
)
from megatron_tropd.losses.signals import with_tokens
from megatron_tropd.teacher import TeacherSource, TeacherStart, load_teacher, signal_of

if TYPE_CHECKING:
    from megatron_tropd.mcore.layout import Layout


def make_teacher(
    starts: Sequence[TeacherStart], config: Config, routes: Routes | None
) -> TeacherSource:
    """Make a run's source: its one teacher's, or one that asks several; collective.

    Args:
        starts: of each teacher, in the order of the config.
        config: of the run.
        routes: whose the prompts are; None: one teacher, which reads what the student reads.
    """
    sources = [load_teacher(start.config.teacher.placement)(start) for start in starts]
    if routes is None:
        return sources[0]
    kept = [alone.signal_top_k for alone in config.by_teacher.values()]
    return RoutedTeacher(
        sources,
        routes,
        starts[0].layout,
        signal=signal_of(config),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        top_k=min([*kept, starts[0].vocab_size]),
    )


class RoutedTeacher:
    """Scores each sequence with the teacher of its prompt, one teacher after the other."""

    def __init__(
        self,
        sources: Sequence[TeacherSource],
        routes: Routes,
        layout: "Layout",
        *,
        signal: type[TeacherSignal],
        tokens_per_micro_batch: int,
        top_k: int,
    ) -> None:
        """Take the teachers.

        Args:
            sources: in the order of ``routes.names``.
            routes: which of them scores which prompt.
            layout: this rank's place.
            signal: what all of them together give.
            tokens_per_micro_batch: of those that are packed for a teacher.
            top_k: ids of a token that are kept of a distribution, if some teachers have no more.
        """
        self.signal, self.sources = signal, tuple(sources)
        self._routes, self._layout, self._top_k = routes, layout, top_k
        self._readers = [_Reader(s, layout, tokens_per_micro_batch) for s in sources]
        self._teachers: list[int] = []

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Give each teacher its own sequences, as it reads them."""
        self._teachers = self._routes.teachers_of(sequences)
        for number, reader in enumerate(self._readers):
            mine = {
                row: self._routes.as_read(sequence)
                for row, sequence in enumerate(sequences)
                if self._teachers[row] == number
            }
            reader.begin(step, mine)

    def signals(self, batches: Sequence[MicroBatch]) -> list[TeacherSignal]:
        """Score with one teacher after the other; collectives: of ``_Reader``."""
        said = [reader.signals(batches) for reader in self._readers]
        if not self._layout.is_last_stage:
            return []
        return [self._together(batch, parts) for batch, *parts in zip(batches, *said, strict=True)]

    def close(self) -> None:
        """Close all of them."""
        for source in self.sources:
            source.close()

    def _together(self, batch: MicroBatch, parts: Sequence[Any]) -> TeacherSignal:
        """Join what the teachers say of their tokens, in the order of the micro-batch's."""
        present = [number for number, part in enumerate(parts) if part is not None]
        signals = [self._reduced(batch, number, parts[number]) for number in present]
        if len(signals) == 1:
            return signals[0]
        pieces, taken = [], [0] * len(present)
        for row, count in zip(batch.rows, batch.loss_counts, strict=True):
            part = present.index(self._teachers[row])
            pieces.append((part, taken[part], count))
            taken[part] += count
        return _joined(signals, pieces, taken)

    def _reduced(self, batch: MicroBatch, number: int, signal: Any) -> Any:
        """Reduce a distribution to its most likely ids if a teacher of the run has no more."""
        if not issubclass(self.signal, TopKSignal):
            return signal
        if isinstance(signal, TopKSignal):
            return dataclasses.replace(
                signal,
                topk_ids_TK=signal.topk_ids_TK[:, : self._top_k],
                topk_logprobs_TK=signal.topk_logprobs_TK[:, : self._top_k],
            )
        ids_T = batch.of_loss_tokens(batch.labels)[self._readers[number].places(batch)]
        group = self._layout.tp_group
        if not isinstance(signal, ReferencedSignal):
            return reduce_signal(signal, ids_T, self._top_k, group=group)[0]
        kept = reduce_signal(signal.teacher, ids_T, self._top_k, group=group)[0]
        reference = reduce_signal(signal.reference, ids_T, 1, group=group)[0]
        return ReferencedTopKSignal(**vars(kept), reference_logprobs_T=reference.sampled_logprobs_T)


def _joined(
    signals: Sequence[Any], pieces: Sequence[tuple[int, int, int]], taken: Sequence[int]
) -> TeacherSignal:
    """One signal of several teachers'.

    Args:
        pieces: as ``RoutedSignal`` has them.
        taken: tokens of each signal.
    """
    if isinstance(signals[0], ReferencedSignal):
        teachers: Any = _joined([s.teacher for s in signals], pieces, taken)
        references: Any = _joined([s.reference for s in signals], pieces, taken)
        return ReferencedSignal(teachers, references)
    if isinstance(signals[0], FullSignal):
        return RoutedSignal(tuple(signals), tuple(pieces))
    starts = [0, *accumulate(taken)]
    order = np.concatenate([np.arange(starts[p] + f, starts[p] + f + n) for p, f, n in pieces])
    width = min(signal.topk_ids_TK.shape[1] for signal in signals)
    at_T = upload(torch.from_numpy(order), signals[0].topk_ids_TK.device)

    def in_order(parts: Sequence[Tensor]) -> Tensor:
        cut = [part[:, :width] if part.dim() == 2 else part for part in parts]
        return torch.cat(cut).index_select(0, at_T)

    return with_tokens(signals, in_order)


class _Reader:
    """A teacher and the sequences that it reads, which need not have the student's prompts."""

    def __init__(
        self, source: TeacherSource, layout: "Layout", tokens_per_micro_batch: int
    ) -> None:
        self._source, self._layout = source, layout
        self._room = tokens_per_micro_batch
        self._numbers: dict[int, int] = {}
        self._read: list[TokenSequence] = []

    def begin(self, step: int, sequences: Mapping[int, TokenSequence]) -> None:
        """Take what is to be scored of a step: row of the step -> sequence as it is read."""
        self._numbers = {row: number for number, row in enumerate(sequences)}
        self._read = list(sequences.values())
        self._source.begin(step, self._read)

    def signals(self, batches: Sequence[MicroBatch]) -> list[Any]:
        """What the teacher says of its tokens in each of the student's micro-batches.

        Returns:
            A signal of its tokens alone in their order; None: the micro-batch has none of its rows.

        Collectives: those of :meth:`_batches` and :meth:`_score`.
        """
        rows = [row for batch in batches for row in batch.rows if row in self._numbers]
        numbers = [self._numbers[row] for row in rows]
        lengths = [len(self._read[n]) - self._read[n].prompt_length for n in numbers]
        first, total = list(accumulate(lengths, initial=0)), sum(lengths)
        its_own = [batch.to(batches[0].tokens.device) for batch in self._batches(numbers)]
        slots = self._score(its_own, dict(zip(numbers, first, strict=False)), total)
        if slots is None:
            return [None] * len(batches)
        of_row = dict(zip(rows, first, strict=False))
        return [
            None
            if not any(row in of_row for row in batch.rows)
            else self._of_batch(batch, slots, of_row)
            for batch in batches
        ]

    def places(self, batch: MicroBatch) -> Tensor:
        """Which of a micro-batch's T tokens this teacher scores, ascending."""
        starts = list(accumulate(batch.loss_counts, initial=0))
        mine = [
            np.arange(start, start + count)
            for row, start, count in zip(batch.rows, starts, batch.loss_counts, strict=False)
            if row in self._numbers
        ]
        return upload(torch.from_numpy(np.concatenate(mine)), batch.tokens.device)

    def _of_batch(self, batch: MicroBatch, slots: Any, first: Mapping[int, int]) -> Any:
        at_T = _slots(batch, first).index_select(0, self.places(batch))
        return with_tokens([slots], lambda parts: parts[0].index_select(0, at_T))

    def _score(self, batches: Sequence[MicroBatch], first: Mapping[int, int], total: int) -> Any:
        """Run the teacher over some of its sequences.

        Args:
            batches: of them.
            first: number of a sequence -> slot of its first response token.
            total: slots.

        Returns:
            A signal with a token for each slot, the same on all context-parallel ranks; None before
            the last stage, and if there is nothing to score.

        Collectives: the teacher's; with context parallelism 1 all-reduce of each tensor, [slots,
        ...].
        """
        # Most sources have nothing to do without rows; a served one meets all ranks.
        called = batches or getattr(self._source, "everywhere", False)
        signals = self._source.signals(batches) if called else []
        if not first or not signals:
            return None
        at = [_slots(batch, first) for batch in batches]

        def put(parts: Sequence[Tensor]) -> Tensor:
            whole = parts[0].new_zeros(total, *parts[0].shape[1:])
            for at_T, part in zip(at, parts, strict=False):
                whole.index_copy_(0, at_T, part)
            if self._layout.row_group is not None:  # every part of a row has its own tokens
                dist.all_reduce(whole, group=self._layout.row_group)
            return whole

        return with_tokens(signals, put)

    def _batches(self, numbers: Sequence[int]) -> list[MicroBatch]:
        """Pack what this rank's rows need, every written token a loss token.

        Collectives: 1 all-reduce of [1] if experts are shared between ranks.
        """
        packed = self._packed(numbers)
        if self._layout.ep_size > 1 and self._read:
            # Experts are shared with ranks that have other rows: all run the teacher as often.
            wanted = self._most(len(packed))
            # Virtual stages make several of one row, of which one is enough.
            packed += (packed or self._packed([0]))[-1:] * (wanted - len(packed))
        return packed

    def _packed(self, numbers: Sequence[int]) -> list[MicroBatch]:
        layout = self._layout
        # Virtual stages want a multiple: the last one again, which fills its slots twice.
        missing = -len(numbers) % layout.batch_multiple
        numbers = [*numbers, *list(numbers[-1:]) * missing]
        read = [self._read[number] for number in numbers]
        written = [(s.writer_N != Writer.CONTEXT).astype(np.float32) for s in read]
        weighed = [s.replace(weight_N=w_N) for s, w_N in zip(read, written, strict=True)]
        packed = pack(
            weighed,
            dp_rank=0,
            dp_size=1,
            tokens_per_micro_batch=self._room,
            pad_multiple=layout.pad_multiple,
            rounded_to=layout.row_multiple,
            batch_multiple=layout.batch_multiple,
            seed=0,
            step=0,
        )
        place = torch.tensor(numbers)
        return [
            layout.local(
                dataclasses.replace(
                    batch,
                    rows=tuple(numbers[row] for row in batch.rows),
                    loss_rows=place[batch.loss_rows],
                )
            )
            for batch in packed
        ]

    def _most(self, count: int) -> int:
        found = torch.tensor([count])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._layout.loss_group)
        return int(found)


def _slots(batch: MicroBatch, first: Mapping[int, int]) -> Tensor:
    """[T] slot of each loss token, by its row and its place in the response; 0 of other rows."""
    table = np.zeros(max(batch.rows, default=-1) + 1, np.int64)
    for row in batch.rows:
        table[row] = first.get(row, 0)
    of_row = upload(torch.from_numpy(table), batch.tokens.device)
    return of_row[batch.loss_rows] + batch.of_loss_tokens(batch.response_positions)
