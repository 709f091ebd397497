"""The teacher on the student's own ranks, in the student's layout: hidden states, never logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.teacher import TeacherStart

if TYPE_CHECKING:
    from megatron_tropd.mcore.frozen import FrozenModel


class ResidentTeacher:
    """A frozen Megatron model that lives beside the student."""

    signal = HiddenStatesSignal

    def __init__(self, scorer: "FrozenModel") -> None:
        """``scorer``: of ``mcore.frozen.frozen_model``."""
        self.scorer = scorer

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Nothing: its ranks are the student's, and busy."""

    def signals(self, batches: Sequence[MicroBatch]) -> Sequence[HiddenStatesSignal]:
        """Run it forward; collectives: those of the schedule."""
        return self.scorer.score(batches)

    def close(self) -> None:
        """Nothing: the model ends with the process."""


class _OfRun(ResidentTeacher):
    """The resident teacher that a run's config names."""

    def __init__(self, start: TeacherStart) -> None:
        """Build it."""
        # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
        from megatron_tropd.mcore.frozen import frozen_model

        super().__init__(
            frozen_model(
                start.folder,
                layout=start.ranks,
                parallel=start.config.parallel,
                dtype=start.dtype,
                padded_vocab_size=start.padded_vocab_size,
                vocab_size=start.vocab_size,
                options=start.config.megatron.teacher,
            )
        )


SOURCE = _OfRun
