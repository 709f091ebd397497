"""The step itself: the trainer's own functions, on models without weights and made-up samples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.base.progress import Progress
from megatron_tropd.config.run import TEACHER, reference_of
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.accounting import expected_tensors
from megatron_tropd.convert.families import plan
from megatron_tropd.convert.hf_folder import HFFolder, read_config
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.engines import start_engines
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.distill.pair import send_weights, step_parts
from megatron_tropd.distill.recordings import ADVANTAGE
from megatron_tropd.distill.reporter import Clock
from megatron_tropd.distill.startup import check_settings
from megatron_tropd.distill.step import learn
from megatron_tropd.mcore import models, parallel, platform, schedule
from megatron_tropd.mcore.checkpoint import Checkpoints
from megatron_tropd.mcore.hidden import unwrap
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.student import Student
from megatron_tropd.planning.planned_run import PlannedRun
from megatron_tropd.rehearsal.engines import Counted, RecordingEngine
from megatron_tropd.rehearsal.other_layout import ToldRows
from megatron_tropd.rehearsal.scores import with_made_up_scores
from megatron_tropd.rehearsal.tensors import CPU, Device
from megatron_tropd.rehearsal.world import World
from megatron_tropd.teacher._routed import RoutedTeacher
from megatron_tropd.teacher.resident import ResidentTeacher
from megatron_tropd.teacher.self import SelfTeacher


class ArchitectureFolder(HFFolder):
    """config.json, and weights of the shapes it says, which hold nothing."""

    def __init__(self, path: Path, device: Device, dtype: torch.dtype) -> None:
        """Read config.json alone."""
        self.path = path
        self.config = read_config(path)
        self._device, self._dtype = device, dtype
        self._shapes = expected_tensors(plan(self.config))
        self._stored_as = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors the architecture has."""
        return frozenset(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """The models' type."""
        return self._dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Part of a tensor, on the host."""
        shape = list(self._shapes[name])
        shape[dim] = len(range(shape[dim])[start:stop])
        return self._device.blank(shape, self._dtype, CPU)


class PhaseClock(Clock):
    """The trainer's clock, which also says whose memory and collectives are counted."""

    def __init__(self, progress: Progress, device: Device) -> None:
        """Begin before the first phase."""
        super().__init__(progress)
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what the block does under ``phase``."""
        events = self._device.events
        outer, events.phase = events.phase, phase
        try:
            with self._device.tracker.phase(phase), super().__call__(phase):
                yield
        finally:
            events.phase = outer


class Kept(list):
    """Hidden states of the micro-batches that were run, and room for those of the others."""

    def __init__(self, made: list[Any], room: list[Tensor]) -> None:
        """``room``: as large as what is missing."""
        super().__init__(made)
        self._room = room


OpenModel = Callable[[Path], HFFolder | MegatronFolder]


class RehearsedRank:
    """A rank of a run with fake tensors, without prompts and weights; engines only write down."""

    def __init__(
        self,
        planned: PlannedRun,
        folder: RunFolder,
        device: Device,
        world: World,
        open_model: OpenModel | None = None,
    ) -> None:
        """Nothing is built yet.

        Args:
            planned: the run, as the planner reads it.
            open_model: opens the models' folders; None: for their shapes alone.
        """
        self.planned, self.folder, self.device, self.world = planned, folder, device, world
        self.config = planned.config
        self.dtype = models.resolve_dtype(self.config.model.dtype)
        self.clock = PhaseClock(Progress(), device)
        self._open_model = open_model or partial(
            ArchitectureFolder, device=device, dtype=self.dtype
        )
        self._missing = 0
        self.run_micro_batches = 0
        """Of the last step."""
        self.engine = RecordingEngine(planned)
        """This rank's, if it owns one."""
        self.engine_bytes = 0
        """Of new weights that reach this rank on their way to an engine."""
        self.checkpoint_bytes = 0
        """That this rank would write."""

    def build(self) -> None:
        """Process groups and both models, wrapped and with an optimizer."""
        config = self.config
        with self.clock("build"):
            if config.run.deterministic:
                platform.be_deterministic()
            self.layout = parallel.initialize(
                config.parallel, seed=config.train.seed, pad_multiple=config.pad_multiple
            )
            self.inputs = self._inputs()
            check_settings(config, self.inputs, is_main=self.layout.is_main, say=_silent)
            self.engines = start_engines(
                "student",
                config,
                self.folder,
                cast(Any, lambda **_: self.engine),
                rank=self.layout.rank,
                world_size=self.layout.world_size,
            )
            # Nobody compares engine and trainer: that takes numbers.
            parts = step_parts(
                with_made_up_scores(config), self.inputs.folders, self.layout, self.inputs.routes
            )
            self.parts = replace(parts, clock=self.clock)
            self.checkpoints = Checkpoints(
                self.folder.checkpoints,
                keep=config.run.keep_checkpoints,
                layout=self.layout,
                distributed_optimizer=config.parallel.distributed_optimizer,
                say=_silent,
            )
        student, teacher = self.parts.student, self.parts.teacher
        self.elsewhere = teacher.elsewhere if isinstance(teacher, ResidentTeacher) else None
        self.rows = None
        if self.elsewhere is not None:
            self.rows = ToldRows(self.parts, self.world)
        self._keep(student, "score", [student.module.config.hidden_size])
        sources = teacher.sources if isinstance(teacher, RoutedTeacher) else (teacher,)
        sizes = {source: _hidden_sizes(source, student) for source in sources}
        for source, hidden in sizes.items():
            # Of teachers with rows of their own all states are there twice until they are sorted.
            rows = 1 + self.layout.cp_size if source is not teacher else 1
            # While the student scores for it, room is held by the student's own method.
            beside = not isinstance(source, SelfTeacher)
            self._keep(source, "signals", hidden * rows, beside=beside)
        if isinstance(teacher, RoutedTeacher) and self.planned.gives_states:
            self._keep(teacher, "signals", max(sizes.values(), key=sum), beside=False)

    def learn(self, micro_batches: int) -> None:
        """Teacher, student and optimizer: the trainer's own step.

        Args:
            micro_batches: to run, of those of the step.
        """
        self._missing = self.planned.work.most_micro_batches - micro_batches
        original = schedule.run_schedule

        trained = self.parts.student.module

        def announced(chunks: Sequence[Any], batches: Any, **options: Any) -> list[Any]:
            models = [unwrap(chunk) for chunk in chunks]
            layout = self.layout
            if self.elsewhere is not None and models[-1] is not trained:
                layout = self.elsewhere.layout
            with self._announced(models, batches, layout):
                return original(chunks, batches, **options)

        setattr(schedule, "run_schedule", announced)  # noqa: B010
        try:
            sequences = made_sequences(self.planned, micro_batches=micro_batches)
            if self.rows is not None:
                self.rows.begin(sequences)
            learn(self.parts, sequences, 0)
        finally:
            schedule.run_schedule = original
        with self.device.tracker.phase("between steps"):
            pass

    def update(self) -> None:
        """The optimizer's part of a step, whatever the gradients are."""
        with self.clock("optimizer"):
            self.parts.student.update()

    def export(self) -> None:
        """New weights to the engines."""
        model = self.parts.student.model
        counted = Counted(model.exported)
        setattr(model, "exported", counted)  # noqa: B010
        with self.clock("sync"):
            send_weights(self.parts, self.engines.channel, version=1)
        self.engine_bytes = counted.bytes

    def save(self) -> None:
        """What the last checkpoint is made of, which any layout can load; nothing is written."""
        with self.clock("checkpoint"):
            state = self.checkpoints.state(
                self.parts.student,
                extra={},
                sharding="fully_reshardable",
                is_loading=False,
            )
            self.checkpoint_bytes = bytes_to_write(state)

    def _keep(self, owner: Any, name: str, sizes: list[int], *, beside: bool = True) -> None:
        """Have a method hold as much as if all micro-batches of the step had been scored.

        Args:
            sizes: hidden sizes of the states of each.
            beside: while it scores, too.
        """
        score = getattr(owner, name)

        def kept(batches: Any) -> list[Any]:
            tokens = len(batches[0].loss_at) if self.layout.is_last_stage and batches else 0
            shapes = [(tokens, size) for size in sizes for _ in range(self._missing * bool(tokens))]
            made = None if beside else score(batches)
            room = [torch.empty(s, dtype=self.dtype, device=self.parts.device) for s in shapes]
            return Kept(score(batches) if made is None else made, room)

        setattr(owner, name, kept)

    @contextmanager
    def _announced(
        self, chunks: Sequence[Any], micro_batches: Any, layout: Layout
    ) -> Iterator[None]:
        """Have neighbours send what this stage would send: hidden states of each micro-batch."""
        config = chunks[0].config
        shards = layout.tp_size if config.sequence_parallel else 1
        shapes = [
            (batch.tokens.shape[1] // shards, batch.tokens.shape[0], config.hidden_size)
            for batch in micro_batches
        ]
        turns = schedule.turns(chunks, len(shapes))
        arriving = [shapes[index] for index, _ in turns]
        # What the first chunk of all reads nobody sends, nor gradients to the last: the ends of a
        # pipeline hear of the others, which are as many whichever of the two is left out.
        inner = [shapes[index] for index, chunk in turns if chunk]
        forward = iter(inner if layout.is_first_stage else arriving)
        backward = iter(inner if layout.is_last_stage else arriving)
        original = P2PCommunicator._communicate_shapes

        def told(neighbours: Any, next_: Any, prev: Any, recv_prev: bool, recv_next: bool) -> Any:
            sent: dict[int, list[tuple[int, ...]]] = {}
            # In the order in which they are received: of two stages both are the same rank.
            if recv_prev:
                sent.setdefault(neighbours.prev_rank, []).append(next(forward))
            if recv_next:
                sent.setdefault(neighbours.next_rank, []).append(next(backward))
            for rank, announced in sent.items():
                self.world.expect_shapes(rank, announced)
            return original(neighbours, next_, prev, recv_prev, recv_next)

        setattr(P2PCommunicator, "_communicate_shapes", told)  # noqa: B010
        try:
            yield
        finally:
            P2PCommunicator._communicate_shapes = original

    def _inputs(self) -> Inputs:
        shapes = [each.shape for each in self.planned.models]
        named: dict[str, str | None] = {"student": self.config.model.student}
        for who, alone in self.config.by_teacher.items():
            named |= {who: alone.model.teacher, reference_of(who): alone.reference}
        return Inputs(
            routes=self._routes(),
            folders={who: self._open_model(Path(path)) for who, path in named.items() if path},
            tokenizer=cast(Any, None),
            vocab_size=min(shape.vocab for shape in shapes),
            context=min(shape.context for shape in shapes),
            stop_token_ids=(),
            prompts=[],
            responses=None,
            recorded=None,
            problem_sets=(),
            max_model_len=self.planned.work.longest,
        )

    def _routes(self) -> Routes | None:
        """Prompts in turns to each teacher, the first to the one whose states are the largest."""
        planned = self.planned
        if not planned.routed:
            return None
        sizes = [sum(model.shape.hidden for model in one.named) for one in planned.teachers]
        order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        of_prompt = {
            prompt: order[prompt % len(order)]
            for prompt in range(self.config.rollout.prompts_per_step)
        }
        contexts = {
            prompt: (1,) * cast(int, planned.context_tokens)
            for prompt, number in of_prompt.items()
            if planned.teachers[number].config.teacher.context is not None
        }
        names = tuple(teacher.name for teacher in self.config.teachers) or (TEACHER,)
        return Routes(names, of_prompt, contexts)


def _hidden_sizes(source: Any, student: Student) -> list[int]:
    """Of the states that a source gives; none if it gives most likely ids."""
    if isinstance(source, SelfTeacher):
        return [student.module.config.hidden_size]
    scorers = source.scorers if isinstance(source, ResidentTeacher) else ()
    return [scorer.chunks[0].config.hidden_size for scorer in scorers]


def _silent(message: str) -> None:
    """Nobody is told what concerns a real run."""


def bytes_to_write(state: Any) -> int:
    """Of the tensors that this rank writes of a sharded state dictionary: copies once, by one."""
    if isinstance(state, ShardedTensorFactory):
        return bytes_to_write(state.build())
    if isinstance(state, ShardedTensor):
        return (
            state.data.nbytes if is_main_replica(state.replica_id) and state.data is not None else 0
        )
    if isinstance(state, dict):
        return sum(map(bytes_to_write, state.values()))
    return sum(map(bytes_to_write, state)) if isinstance(state, list | tuple) else 0


def made_sequences(planned: PlannedRun, *, micro_batches: int | None = None) -> list[TokenSequence]:
    """The longest step that memory has to hold, as the planner assumes it.

    Args:
        micro_batches: of each replica; None: all of the step.
    """
    work, config = planned.work, planned.config
    count = work.trajectories
    if micro_batches is not None:
        rows = config.train.tokens_per_micro_batch // work.longest
        count = min(count, micro_batches * rows * planned.parallel.data)
    response = (1,) * work.longest_response
    taught = work.longest_response // 2 if config.guidance.responses else 0
    prompt, logprobs = (1,) * work.prompt, (-1.0,) * (work.longest_response - taught)
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt

    def key(number: int) -> SampleKey:
        if planned.routed:  # neighbours have different teachers
            return SampleKey(0, number % prompts, number // prompts)
        return SampleKey(0, *divmod(number, samples))

    return [
        TokenSequence.of_runs(
            key(number),
            (Writer.CONTEXT, prompt),
            (Writer.TEACHER, response[:taught]),
            (Writer.STUDENT, response[taught:]),
            logprobs=logprobs,
            version=0,
            fields={ADVANTAGE: 0.0},
        )
        for number in range(count)
    ]
