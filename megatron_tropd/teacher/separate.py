"""The teacher on ranks of its own, as the student's ranks see it: ``teacher.placement = "separate"``.

What its ranks do is in ``_own_ranks.py``. The student's first rank tells them what there is to
score, as soon as it is known, and later when the student wants the states; then all ranks of the
job exchange them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal
from megatron_tropd.teacher import TeacherStart

if TYPE_CHECKING:
    from torch import Tensor


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
        self._step, self._sequences = 0, dict[int, TokenSequence]()

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Have the sequences scored, unless that was asked for."""
        self.foresee(step, sequences)
        self._step, self._sequences = step, dict(enumerate(sequences))
        self._told.discard(step)

    def foresee(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Have the sequences of a step to come scored, while the student does something else."""
        from megatron_tropd.teacher._own_ranks import Score

        if step not in self._told:
            self._told.add(step)
            self._tell(Score(step, dict(enumerate(sequences))))

    def signals(
        self, batches: Sequence[MicroBatch]
    ) -> Sequence[HiddenStatesSignal] | Sequence[ReferencedSignal]:
        """Fetch the states; collectives: those of the exchange, over all ranks of the job."""
        from megatron_tropd.mcore.exchange import all_wants, receive_from_others
        from megatron_tropd.teacher._own_ranks import Give

        wants = all_wants(batches, self._layout)
        self._tell(Give(self._step, wants))
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
