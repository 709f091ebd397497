"""The source that samples nothing: recorded sequences, in an order that the seed gives."""

from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.sequence import TokenSequence


class RecordedRollouts:
    """Groups of sequences, one group for each prompt of a step; it has no state to save."""

    def __init__(
        self, groups: Sequence[Sequence[TokenSequence]], *, prompts_per_step: int, seed: int
    ) -> None:
        """Ask for nothing yet.

        Args:
            seed: ``train.seed``; keys the order.
        """
        self._groups = groups
        self._per_step, self._seed = prompts_per_step, seed
        self._asked: int | None = None

    def begin(self, step: int) -> None:
        """Ask for the groups of a step: a permutation of all for each epoch."""
        if self._asked is None:
            self._asked = step

    def collect(self) -> list[TokenSequence]:
        """Their sequences, as of this step."""
        step, self._asked = self._asked, None
        assert step is not None, "collect before begin"
        return self.arrived(step)

    def arrived(self, step: int) -> list[TokenSequence]:
        """Those of any step."""
        chosen = prompts_of_step(len(self._groups), self._per_step, step, self._seed)
        return [
            sequence.replace(key=sequence.key._replace(step=step))
            for index in chosen
            for sequence in self._groups[index]
        ]

    def forget(self) -> None:
        """Give up what was asked for."""
        self._asked = None

    def state(self) -> dict[str, bytes]:
        """Nothing: a step's sequences follow from its number."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Nothing to take up."""
