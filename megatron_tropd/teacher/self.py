"""The student's own weights as its teacher: as it started, or averaged over the steps.

It is of use if the teacher reads something else than the student does (``teacher.context``).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.teacher import TeacherSource, TeacherStart, resident

if TYPE_CHECKING:
    from megatron_tropd.mcore.student import Student


class SelfTeacher:
    """Runs the student's own modules, with other weights in them for as long as it scores."""

    def __init__(
        self,
        student: "Student",
        weights: Callable[[], AbstractContextManager[None]],
        vocab_size: int,
    ) -> None:
        """Take a student.

        Args:
            weights: a block in which the student has the teacher's.
            vocab_size: columns that are real in all models.
        """
        self.signal = HiddenStatesSignal
        self._student, self._weights, self._vocab_size = student, weights, vocab_size

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Take the last update into the average, if the student keeps one."""
        if self._student.average is not None:
            self._student.average.update()

    def signals(self, batches: Sequence[MicroBatch]) -> list[HiddenStatesSignal]:
        """Run it forward; collectives: those of the schedule."""
        from megatron_tropd.mcore.hidden import output_weight

        with self._weights():
            hidden = self._student.score(batches)
            if not self._student.model.layout.is_last_stage:
                return []
            # An average's stays alive after the block: the loss reads it.
            weight_vH = output_weight(self._student.module).detach()
        return [HiddenStatesSignal(states, weight_vH, self._vocab_size) for states in hidden]

    def close(self) -> None:
        """Nothing: the weights end with the process."""


class _OfRun:
    """Makes the teacher that a run's config asks of its student."""

    signal = HiddenStatesSignal
    referenced = None

    def __call__(self, start: TeacherStart) -> TeacherSource:
        """Keep an average, leave adapters out, or build a copy of the first weights."""
        from megatron_tropd.mcore.average import Average
        from megatron_tropd.mcore.lora import LoraModel

        student, decay = start.student, start.config.teacher.ema_decay
        if student is None:
            raise ConfigError(
                'teacher.placement = "self" scores with the student of a run, found none. Name '
                'the student\'s folder in model.teacher, with teacher.placement = "resident".'
            )
        if decay is not None:
            student.average = Average(student.model, decay=decay)
            return SelfTeacher(student, student.average.in_place, start.vocab_size)
        if isinstance(student.model, LoraModel):
            return SelfTeacher(student, student.model.base_only, start.vocab_size)
        return resident.SOURCE(start)


SOURCE = _OfRun()
