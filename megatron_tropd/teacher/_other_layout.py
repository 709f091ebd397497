"""The teacher on the student's ranks in a layout of its own: ``[teacher.parallel]``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from megatron_tropd.base.progress import limits
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.dealing import BatchRows, Work
from megatron_tropd.data.packing import dealt, packed
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.elsewhere import ModelElsewhere
from megatron_tropd.mcore.exchange import plan_exchange
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.own_groups import OwnGroups
from megatron_tropd.teacher import TeacherStart


@dataclass(frozen=True)
class Dealer:
    """Deals sequences to the replicas of a teacher in a layout of its own."""

    layout: Layout
    """A place in it."""
    tokens: int
    """train.tokens_per_micro_batch."""
    work: Work

    @classmethod
    def of(cls, start: TeacherStart, layout: Layout) -> Self:
        """That of a run."""
        work = partial(row_flops, model_shape(start.folder.config))
        return cls(layout, start.config.train.tokens_per_micro_batch, work)

    def dealt(
        self, sequences: Mapping[int, TokenSequence], numbers: Sequence[int]
    ) -> list[list[BatchRows]]:
        """Micro-batches of each replica; ``rows`` name the sequences.

        Args:
            sequences: by their numbers.
            numbers: those that are dealt.
        """
        # Every replica needs as many rows: the last one again, whose states nobody takes.
        missing = -len(numbers) % self.layout.dp_size
        filled = [*numbers, *[numbers[-1]] * missing]
        dealing = dealt(
            [sequences[number] for number in filled],
            dp_size=self.layout.dp_size,
            tokens_per_micro_batch=self.tokens,
            pad_multiple=self.layout.pad_multiple,
            rounded_to=self.layout.row_multiple,
            work=self.work,
        )
        return [
            [batch._replace(rows=tuple(filled[row] for row in batch.rows)) for batch in batches]
            for batches in dealing.replicas
        ]


class OtherLayout:
    """Frozen models that have a step's sequences dealt to replicas of their own."""

    def __init__(self, start: TeacherStart) -> None:
        """Build the teacher, and its reference if there is one, in one layout; collective."""
        config = start.config
        groups = OwnGroups(
            config.teacher_parallel,
            pad_multiple=config.teacher_parallel.row_shards * config.megatron.token_multiple,
            timeout_seconds=limits(config.run.timeout_minutes).collectives,
        )
        self.layout, self._student = groups.layout, start.layout
        self._dealer = Dealer.of(start, groups.layout)
        self._sequences: Sequence[TokenSequence] = ()
        folders = {"teacher": start.folder, "reference": start.reference}
        self.models = [
            ModelElsewhere(
                folder,
                groups=groups,
                student=start.layout,
                dtype=start.dtype,
                padded_vocab_size=start.padded_vocab_size,
                vocab_size=start.vocab_size,
                who=who,
                options=config.megatron.teacher,
                offload=config.teacher.offload,
            )
            for who, folder in folders.items()
            if folder is not None
        ]

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Keep the next step's sequences."""
        self._sequences = sequences

    def plan(self, wanted: Sequence[MicroBatch]) -> None:
        """Deal the step's sequences, and tell the models who sends which states to whom.

        Args:
            wanted: the student's micro-batches, made of the sequences of the last :meth:`begin`.

        Collectives: those of ``plan_exchange``.
        """
        sequences = dict(enumerate(self._sequences))
        dealt = self._dealer.dealt(sequences, list(sequences))
        mine = dealt[self.layout.dp_rank]
        exchange = plan_exchange(
            dealt,
            packed(self._sequences, mine, seed=0, step=0),
            wanted,
            sequences,
            scorer=self.layout,
            student=self._student,
        )
        device = platform.device()
        exchange = replace(exchange, batches=[b.to(device) for b in exchange.batches])
        for model in self.models:
            model.exchange = exchange
