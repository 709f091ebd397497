"""The teacher on the student's own ranks, in the student's layout: hidden states, never logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.teacher import TeacherStart

if TYPE_CHECKING:
    from megatron_tropd.mcore.step import Teacher


class ResidentTeacher:
    """A frozen Megatron model that lives beside the student, perhaps with its reference."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __init__(self, start: TeacherStart) -> None:
        """Build the models."""
        models = {"teacher": start.folder, "reference": start.reference}
        self.scorers = [_build(start, who, folder) for who, folder in models.items() if folder]

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Nothing: its ranks are the student's, and busy."""

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Run each model forward; collectives: those of the schedule."""
        teacher, *reference = [scorer.score(batches) for scorer in self.scorers]
        if not reference:
            return teacher
        return [ReferencedSignal(*both) for both in zip(teacher, *reference, strict=True)]

    def close(self) -> None:
        """Nothing: the models end with the process."""


def _build(start: TeacherStart, who: str, folder: HFFolder | MegatronFolder) -> "Teacher":
    # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
    from megatron_tropd.mcore.models import build_model
    from megatron_tropd.mcore.step import Teacher

    model = build_model(
        folder,
        ranks=start.ranks,
        parallel=start.config.parallel,
        dtype=start.dtype,
        padded_vocab_size=start.padded_vocab_size,
        who=who,
        options=start.config.megatron.teacher,
    )
    return Teacher(model, ranks=start.ranks, vocab_size=start.vocab_size)


SOURCE = ResidentTeacher
