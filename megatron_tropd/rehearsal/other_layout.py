"""A teacher in a layout of its own, rehearsed: what the other ranks would tell of their rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import pack
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore.exchange import Offered, Wanted
from megatron_tropd.rehearsal.world import World

if TYPE_CHECKING:
    from megatron_tropd.teacher._other_layout import OtherLayoutTeacher


class ToldRows:
    """Answers of all ranks to what ``plan_exchange`` gathers."""

    def __init__(self, parts: StepParts, teacher: "OtherLayoutTeacher", world: World) -> None:
        """Tell the world who says what."""
        self._parts, self._teacher = parts, teacher
        self._packed: dict[tuple[str, int], list[MicroBatch]] = {}
        self._of: Sequence[TokenSequence] = ()
        world.let_each_say(Offered, self._offered)
        world.let_each_say(Wanted, self._wanted)

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        """Know the next step's sequences."""
        self._of, self._packed = sequences, {}

    def _offered(self, rank: int) -> Offered:
        layout = self._teacher.layout
        dp_rank = layout.place(rank)[2] // layout.cp_size
        key = "teacher", dp_rank
        if key not in self._packed:
            self._packed[key] = self._teacher.dealt(dp_rank)
        return Offered.of(self._packed[key])

    def _wanted(self, rank: int) -> Wanted:
        parts, layout = self._parts, self._parts.layout
        dp_rank = layout.place(rank)[2] // layout.cp_size
        key = "student", dp_rank
        if key not in self._packed:
            self._packed[key] = pack(
                self._of,
                dp_rank=dp_rank,
                dp_size=layout.dp_size,
                tokens_per_micro_batch=parts.tokens_per_micro_batch,
                pad_multiple=parts.pad_multiple,
                rounded_to=parts.rounded_to,
                seed=parts.seed,
                step=0,
            )
        return Wanted.of(self._packed[key])
