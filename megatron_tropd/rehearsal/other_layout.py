"""A teacher in a layout of its own, rehearsed: what the other ranks would tell of their rows."""

from collections.abc import Sequence

from megatron_tropd.data.dealing import Dealing
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.step import dealt_to_replicas
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore.exchange import Wanted
from megatron_tropd.rehearsal.world import World


class ToldRows:
    """Answers of all ranks to what ``plan_exchange`` gathers."""

    def __init__(self, parts: StepParts, world: World) -> None:
        """Tell the world who says what."""
        self._parts = parts
        self._dealing: Dealing | None = None
        world.let_each_say(Wanted, self._wanted)

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Know the next step's sequences."""
        self._dealing = dealt_to_replicas(self._parts, sequences)

    def _wanted(self, rank: int) -> Wanted:
        if self._dealing is None:  # nothing is scored yet
            return Wanted(())
        layout = self._parts.layout
        return Wanted(self._dealing.replicas[layout.place(rank)[2] // layout.cp_size])
