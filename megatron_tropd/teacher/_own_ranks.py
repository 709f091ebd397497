"""What the ranks of a separate teacher do: load it, score, hand over, until the student is done."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tropd.base.progress import IDLE, Progress
from megatron_tropd.config import Config
from megatron_tropd.config.run import TEACHER, reference_of
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.dealing import BatchRows
from megatron_tropd.data.packing import packed
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.mcore import models, platform, schedule
from megatron_tropd.mcore.bridge import Bridge
from megatron_tropd.mcore.elsewhere import output_layer_across
from megatron_tropd.mcore.exchange import Wanted, send_to_others, written_batch
from megatron_tropd.mcore.frozen import FrozenModel
from megatron_tropd.mcore.hidden import output_weight
from megatron_tropd.mcore.layout import Layout, layout_of
from megatron_tropd.teacher._other_layout import Dealer

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Score:
    """Score these sequences of a step; by their numbers."""

    step: int
    sequences: dict[int, TokenSequence]


@dataclass(frozen=True)
class Give:
    """Hand the states of a step over to the student's ranks."""

    step: int
    wants: list[Wanted]


@dataclass(frozen=True)
class End:
    """There is nothing more to do."""


@dataclass
class _Scored:
    """A step's sequences, and what this rank has of their states."""

    sequences: dict[int, TokenSequence] = field(default_factory=dict)
    dealt: list[list[BatchRows]] = field(default_factory=list)
    batches: list[MicroBatch] = field(default_factory=list)
    """This rank's part of them, on the host."""
    states: list[list[Tensor]] = field(default_factory=list)
    """Of each model: of each micro-batch on the last stage, none elsewhere."""


class OwnRanks:
    """The frozen models on one of their own ranks."""

    def __init__(
        self,
        config: Config,
        folders: Mapping[str, HFFolder | MegatronFolder],
        layout: Layout,
        bridge: Bridge,
    ) -> None:
        """Build the teacher, and its reference if there is one; collective over the whole job.

        Args:
            folders: of all models of the run; the student's is not read.
            layout: this rank's place in the teacher's.
        """
        self._config, self._layout, self._bridge = config, layout, bridge
        self._student = layout_of(config.parallel)
        self._dtype = models.resolve_dtype(config.model.dtype)
        shapes = [folder.config for folder in folders.values()]
        self._padded = models.padded_vocab_size(*shapes, tensor=config.parallel.tensor)
        names = [who for who in (TEACHER, reference_of(TEACHER)) if who in folders]
        self._models = [self._build(who, folders[who]) for who in names]
        self._sizes = [model_shape(folders[who].config).hidden for who in names]
        shape = model_shape(folders[TEACHER].config)
        tokens = config.train.tokens_per_micro_batch
        self._dealer = Dealer(layout, tokens, lambda length: row_flops(shape, length))
        self._steps: dict[int, _Scored] = {}

    def serve(self, progress: Progress, clock: Clock) -> None:
        """Do what the student's first rank says, until it says that there is no more.

        Args:
            progress: told the step and that this rank waits.
            clock: measures a phase.
        """
        while True:
            progress.enter(IDLE)
            message = self._bridge.hear()
            if isinstance(message, End):
                return
            progress.step = message.step
            if isinstance(message, Score):
                with clock("scoring"):
                    self.score(message)
            else:
                with clock("handing over"):
                    self.give(message)

    @torch.no_grad()
    def score(self, asked: Score) -> None:
        """Compute and keep the states of all written tokens; collectives: of the schedule."""
        numbers = list(asked.sequences)
        dealt = self._dealer.dealt(asked.sequences, numbers)
        place = {number: at for at, number in enumerate(numbers)}
        mine = [
            rows._replace(rows=tuple(place[number] for number in rows.rows))
            for rows in dealt[self._layout.dp_rank]
        ]
        made = packed(list(asked.sequences.values()), mine, seed=0, step=0)
        local = [written_batch(self._layout.local(batch)) for batch in made]
        moved = [batch.to(platform.device()) for batch in local]
        states = []
        for model in self._models:
            with model.ready(len(moved)):
                states.append(schedule.hidden_states(model.chunks, moved))
        self._steps[asked.step] = _Scored(asked.sequences, dealt, local, states)

    def give(self, asked: Give) -> None:
        """Send the states to those that want them; collectives: of the exchange."""
        scored = self._steps.pop(asked.step)
        exchange = send_to_others(
            scored.dealt,
            scored.batches,
            asked.wants,
            scored.sequences,
            scorer=self._layout,
            student=self._student,
            group=self._bridge.group,
        )
        for hidden_size, states in zip(self._sizes, scored.states, strict=True):
            left = deque(states)

            def taken(batches: Sequence[MicroBatch], left: deque[Tensor] = left) -> list[Tensor]:
                return [left.popleft() for _ in batches if left]

            exchange.states(taken, (), hidden_size=hidden_size, dtype=self._dtype)

    def _build(self, who: str, folder: HFFolder | MegatronFolder) -> FrozenModel:
        own = models.padded_vocab_size(folder.config, tensor=self._layout.tp_size)
        built = models.build_model(
            folder,
            layout=self._layout,
            parallel=self._config.teacher_parallel,
            dtype=self._dtype,
            padded_vocab_size=own,
            who=who,
            options=self._config.megatron.teacher,
        )
        output_layer_across(
            output_weight(built.module).detach() if self._layout.is_last_stage else None,
            folder.config,
            scorer=self._layout,
            student=self._student,
            padded_vocab_size=self._padded,
            dtype=self._dtype,
            group=self._bridge.group,
        )
        if self._layout.is_last_stage:
            # Of its output layer nothing but its place is run.
            built.module.output_layer.weight = None
        return FrozenModel(built, vocab_size=own, offload=self._config.teacher.offload)
