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
from megatron_tropd.mcore.exchange import plan_exchange
from megatron_tropd.mcore.own_groups import OwnGroups
from megatron_tropd.teacher import TeacherStart
from megatron_tropd.teacher.resident import ResidentTeacher


class OtherLayoutTeacher(ResidentTeacher):
    """Frozen models that deal a step's sequences to replicas of their own."""

    def __init__(self, start: TeacherStart) -> None:
        """Build the teacher, and its reference if there is one, in one layout; collective."""
        config = start.config
        groups = OwnGroups(
            config.teacher_parallel,
            pad_multiple=config.teacher_parallel.row_shards * config.megatron.token_multiple,
            timeout_seconds=limits(config.run.timeout_minutes).collectives,
        )
        self.layout, self._student = groups.layout, start.layout
        self._tokens = config.train.tokens_per_micro_batch
        self._sequences: Mapping[int, TokenSequence] = {}
        models = {"teacher": start.folder, "reference": start.reference}
        self._models = [
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
        super().__init__(*self._models)

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Keep the step's sequences, which are dealt anew."""
        self._sequences = dict(enumerate(sequences))

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Run each model forward; collectives: those of ``plan_exchange`` and of the scorers."""
        exchange = plan_exchange(
            self.dealt(self.layout.dp_rank),
            batches,
            self._sequences,
            scorer=self.layout,
            student=self._student,
        )
        device = platform.device()
        exchange = replace(exchange, batches=[b.to(device) for b in exchange.batches])
        for model in self._models:
            model.exchange = exchange
        return super().signals(batches)

    def dealt(self, dp_rank: int) -> list[MicroBatch]:
        """A replica's share of the step, whole rows on the host."""
        numbers, replicas = list(self._sequences), self.layout.dp_size
        # Every replica needs as many rows: the last one again, whose states nobody takes.
        numbers += numbers[-1:] * (-len(numbers) % replicas)
        packed = pack(
            [self._sequences[number] for number in numbers],
            dp_rank=dp_rank,
            dp_size=replicas,
            tokens_per_micro_batch=self._tokens,
            pad_multiple=self.layout.pad_multiple,
            rounded_to=self.layout.row_multiple,
            seed=0,
            step=0,
        )
        return [replace(b, rows=tuple(numbers[row] for row in b.rows)) for b in packed]
