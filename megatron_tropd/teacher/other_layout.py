"""The teacher on the student's ranks in a layout of its own: ``[teacher.parallel]``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_tropd.base.progress import limits
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import pack
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.elsewhere import ModelElsewhere
from megatron_tropd.mcore.exchange import Exchange, plan_exchange
from megatron_tropd.mcore.own_groups import OwnGroups
from megatron_tropd.teacher import TeacherStart


class OtherLayoutTeacher:
    """Frozen models that deal a step's sequences to replicas of their own."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __init__(self, start: TeacherStart) -> None:
        """Build the teacher, and its reference if there is one, in one layout; collective."""
        config = start.config
        groups = OwnGroups(
            config.teacher_parallel,
            pad_multiple=config.teacher_parallel.row_shards * config.megatron.token_multiple,
            timeout_seconds=limits(config.run.timeout_minutes).collectives,
        )
        self._student, self._layout = start.layout, groups.layout
        self._tokens = config.train.tokens_per_micro_batch
        self._sequences: Mapping[int, TokenSequence] = {}
        models = {"teacher": start.folder, "reference": start.reference}
        self.scorers = [
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
            for who, folder in models.items()
            if folder is not None
        ]

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Keep the step's sequences, which are dealt anew."""
        self._sequences = dict(enumerate(sequences))

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Run each model forward; collectives: those of ``plan_exchange`` and ``score``."""
        exchange = self._exchange(batches)
        teacher, *reference = [scorer.score(batches, exchange) for scorer in self.scorers]
        if not reference:
            return teacher
        return [ReferencedSignal(*both) for both in zip(teacher, *reference, strict=True)]

    def close(self) -> None:
        """Nothing: the models end with the process."""

    def _exchange(self, batches: Sequence[MicroBatch]) -> Exchange:
        plan = plan_exchange(
            self._dealt(),
            batches,
            self._sequences,
            scorer=self._layout,
            student=self._student,
        )
        device = platform.device()
        return replace(plan, batches=[batch.to(device) for batch in plan.batches])

    def _dealt(self) -> list[MicroBatch]:
        """This replica's share of the step, whole rows on the host."""
        layout = self._layout
        numbers = list(self._sequences)
        # Every replica needs as many rows: the last one again, whose states nobody takes.
        numbers += numbers[-1:] * (-len(numbers) % layout.dp_size)
        packed = pack(
            [self._sequences[number] for number in numbers],
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            tokens_per_micro_batch=self._tokens,
            pad_multiple=layout.pad_multiple,
            rounded_to=layout.row_multiple,
            seed=0,
            step=0,
        )
        return [replace(b, rows=tuple(numbers[row] for row in b.rows)) for b in packed]
