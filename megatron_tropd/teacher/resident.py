"""The teacher on the student's own ranks: hidden states, never logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.teacher import TeacherStart

if TYPE_CHECKING:
    from megatron_tropd.mcore.elsewhere import ModelElsewhere
    from megatron_tropd.mcore.frozen import FrozenModel
    from megatron_tropd.teacher._other_layout import OtherLayout


class ResidentTeacher:
    """A frozen Megatron model that lives beside the student, perhaps with its reference."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __init__(
        self, *scorers: "FrozenModel | ModelElsewhere", elsewhere: "OtherLayout | None" = None
    ) -> None:
        """Take built models.

        Args:
            scorers: the teacher and perhaps its reference.
            elsewhere: their layout, if it is not the student's.
        """
        self.scorers, self.elsewhere = scorers, elsewhere

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Note the sequences if they are dealt anew: the ranks are the student's, and busy."""
        if self.elsewhere is not None:
            self.elsewhere.begin(sequences)

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Run each model forward; collectives: those of the schedule, and of an exchange."""
        if self.elsewhere is not None:
            self.elsewhere.plan(batches)
        teacher, *reference = [scorer.score(batches) for scorer in self.scorers]
        if not reference:
            return teacher
        return [ReferencedSignal(*both) for both in zip(teacher, *reference, strict=True)]

    def close(self) -> None:
        """Nothing: the models end with the process."""


class _OfRun(ResidentTeacher):
    """The resident teacher that a run's config names."""

    def __init__(self, start: TeacherStart) -> None:
        """Build its models."""
        # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
        from megatron_tropd.mcore.frozen import frozen_model
        from megatron_tropd.teacher._other_layout import OtherLayout

        if start.config.teacher.parallel is not None:
            elsewhere = OtherLayout(start)
            super().__init__(*elsewhere.models, elsewhere=elsewhere)
            return
        models = {"teacher": start.folder, "reference": start.reference}
        super().__init__(
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


SOURCE = _OfRun
