"""The teacher on the student's own ranks, in the student's layout: hidden states, never logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.teacher import TeacherSource, TeacherStart

if TYPE_CHECKING:
    from megatron_tropd.mcore.elsewhere import ModelElsewhere
    from megatron_tropd.mcore.frozen import FrozenModel


class ResidentTeacher:
    """A frozen Megatron model that lives beside the student, perhaps with its reference."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __init__(self, *scorers: "FrozenModel | ModelElsewhere") -> None:
        """``scorers``: the teacher and perhaps its reference."""
        self.scorers = scorers

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Nothing: its ranks are the student's, and busy."""

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Run each model forward; collectives: those of the scorers."""
        teacher, *reference = [scorer.score(batches) for scorer in self.scorers]
        if not reference:
            return teacher
        return [ReferencedSignal(*both) for both in zip(teacher, *reference, strict=True)]

    def close(self) -> None:
        """Nothing: the models end with the process."""


class _OfRun:
    """Makes the resident teacher that a run's config names."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __call__(self, start: TeacherStart) -> TeacherSource:
        """Build its models: in the student's layout, or in [teacher.parallel]."""
        # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
        from megatron_tropd.mcore.frozen import frozen_model
        from megatron_tropd.teacher._other_layout import OtherLayoutTeacher

        if start.config.teacher.parallel is not None:
            return OtherLayoutTeacher(start)
        models = {"teacher": start.folder, "reference": start.reference}
        return ResidentTeacher(
            *(
                frozen_model(
                    folder,
                    layout=start.layout,
                    parallel=start.config.parallel,
                    dtype=start.dtype,
                    padded_vocab_size=start.padded_vocab_size,
                    vocab_size=start.vocab_size,
                    who=who,
                    options=start.config.megatron.teacher,
                    offload=start.config.teacher.offload,
                )
                for who, folder in models.items()
                if folder is not None
            )
        )


SOURCE = _OfRun()
