"""The teacher on ranks of its own (``teacher.placement = "separate"``), as the student's see it.

What its ranks do is in ``_own_ranks.py``. The student's first rank tells them what there is to
score, as soon as it is known, and later when the student wants the states; then all ranks of the
job exchange them.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.teacher import TeacherStart

if TYPE_CHECKING:
    from torch import Tensor

Arrived = Callable[[int], "Sequence[TokenSequence] | None"]
_LOOK_SECONDS = 0.05


class SeparateTeacher:
    """Hidden states of frozen models that other ranks hold."""

    signal = HiddenStatesSignal
    referenced = ReferencedSignal

    def __init__(self, start: TeacherStart) -> None:
        """Take over the models' output layers; collective over all ranks of the job."""
        # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
        from megatron_tropd.mcore import parallel
        from megatron_tropd.mcore.layout import layout_of
        from megatron_tropd.teacher._other_layout import Dealer

        config = start.config
        self._bridge, self._layout = parallel.bridge(), start.layout
        self._vocab_size, self._dtype = start.vocab_size, start.dtype
        own = config.teacher_parallel
        self._dealer = Dealer.of(
            start, layout_of(own, pad_multiple=own.row_shards * config.megatron.token_multiple)
        )
        folders = [start.folder, *([start.reference] if start.reference else [])]
        self._weights = [self._output_layer(folder.config, start) for folder in folders]
        self._told: set[int] = set()
        """Steps whose sequences the teacher has."""
        self._arrived: Arrived | None = None
        self._watcher: threading.Thread | None = None
        self._enough = threading.Event()
        self._step, self._sequences = 0, dict[int, TokenSequence]()

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Have the sequences scored, unless that was asked for."""
        self._stop_watching()
        self._score(step, sequences)
        self._step, self._sequences = step, dict(enumerate(sequences))
        self._told.discard(step)

    def look_ahead(self, arrived: Arrived) -> None:
        """Score a step while the student trains the one before, as soon as its samples are there.

        Args:
            arrived: says, on the student's first rank and in any thread, which step's sequences
                are there before their turn.
        """
        self._arrived = arrived

    def _score(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Tell the teacher, unless it was told."""
        from megatron_tropd.teacher._own_ranks import Score

        if step not in self._told:
            self._told.add(step)
            self._tell(Score(step, dict(enumerate(sequences))))

    def _watch(self) -> None:
        """Look for the next step's sequences, in a thread of the student's first rank."""
        while not self._enough.wait(_LOOK_SECONDS):
            if self._arrived is not None and (found := self._arrived(self._step + 1)):
                self._score(self._step + 1, found)
                return

    def _stop_watching(self) -> None:
        self._enough.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Fetch the states; collectives: those of the exchange, over all ranks of the job."""
        from megatron_tropd.mcore.exchange import all_wants, receive_from_others
        from megatron_tropd.teacher._own_ranks import Give

        wants = all_wants(batches, self._layout)
        self._tell(Give(self._step, wants))
        # Not before: the teacher does what it is told in this order.
        if self._arrived is not None and self._layout.is_main:
            self._enough.clear()
            self._watcher = threading.Thread(target=self._watch, name="look ahead", daemon=True)
            self._watcher.start()
        exchange = receive_from_others(
            self._dealer.dealt(self._sequences, list(self._sequences)),
            wants,
            self._sequences,
            scorer=self._dealer.layout,
            student=self._layout,
            group=self._bridge.group,
        )
        found = []
        for weight_vH in self._weights:
            states = exchange.states(
                lambda _: [], batches, hidden_size=weight_vH.shape[1], dtype=self._dtype
            )
            found.append([HiddenStatesSignal(h, weight_vH, self._vocab_size) for h in states])
        teacher, *reference = found
        if not reference:
            return teacher
        return [ReferencedSignal(*both) for both in zip(teacher, *reference, strict=True)]

    def close(self) -> None:
        """Let the teacher's ranks end."""
        from megatron_tropd.teacher._own_ranks import End

        self._stop_watching()
        self._tell(End())

    def _tell(self, message: object) -> None:
        if self._layout.is_main:
            self._bridge.tell(message)

    def _output_layer(self, of_model: dict[str, Any], start: TeacherStart) -> "Tensor":
        from megatron_tropd.mcore.elsewhere import output_layer_across

        return output_layer_across(
            None,
            of_model,
            scorer=self._dealer.layout,
            student=self._layout,
            padded_vocab_size=start.padded_vocab_size,
            dtype=start.dtype,
            group=self._bridge.group,
        )


SOURCE = SeparateTeacher
