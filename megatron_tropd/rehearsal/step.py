"""The step itself: the trainer's own functions, on models without weights and made-up samples."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from torch import Tensor

from megatron_tropd.base.files import write_json
from megatron_tropd.base.progress import Progress
from megatron_tropd.config import config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.accounting import expected_tensors
from megatron_tropd.convert.families import plan
from megatron_tropd.convert.hf_folder import HFFolder, read_config
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill import job
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.distill.job import Job
from megatron_tropd.distill.loop import learn
from megatron_tropd.distill.recordings import ADVANTAGE
from megatron_tropd.distill.reporter import Clock
from megatron_tropd.mcore import models, parallel, platform, step, weights
from megatron_tropd.mcore.checkpoint import Checkpoints
from megatron_tropd.mcore.hidden import unwrap
from megatron_tropd.planning import Setup
from megatron_tropd.rehearsal.engines import Counted, RecordingEngine
from megatron_tropd.rehearsal.tensors import CPU, Device
from megatron_tropd.rehearsal.world import World
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.teacher.resident import ResidentTeacher


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


class RehearsedJob(Job):
    """A rank of a run with fake tensors, without prompts and weights; engines only write down."""

    def __init__(self, setup: Setup, folder: RunFolder, device: Device, world: World) -> None:
        """Nothing is built yet.

        Args:
            setup: the run, as the planner reads it.
            folder: an empty one.
            device: where tensors go.
            world: the other ranks.
        """
        folder.root.mkdir(parents=True, exist_ok=True)
        write_json(folder.config, config_to_dict(setup.config))
        super().__init__(folder, console=io.StringIO(), stop=cast(Any, _NeverStop()))
        self.setup, self.rehearsed, self.world = setup, device, world
        self.clock = PhaseClock(self._progress, device)
        # Engine and trainer are compared by numbers.
        self._compared = True
        self._missing = 0
        self.run_micro_batches = 0
        """Of the last step."""
        self.engine = RecordingEngine(setup)
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
            self.ranks = parallel.initialize(config.parallel, seed=config.train.seed)
            self.device = platform.device()
            self.dtype = models.resolve_dtype(config.model.dtype)
            self.inputs = self._inputs()
            self.is_main = self.ranks.is_main
            self._check_options()
            self._check_steps_ahead()
            self.hf_folders = {"student": self.inputs.student.path}
            self.engines = self._start_engines()
            self._build_models()
            self.checkpoints = Checkpoints(
                self.folder.checkpoints,
                keep=config.run.keep_checkpoints,
                ranks=self.ranks,
                distributed_optimizer=config.parallel.distributed_optimizer,
                say=lambda _: None,
            )
        scored: list[tuple[Any, str, list[Any]]] = [(self.student, "score", [self.student.model])]
        if isinstance(self.teacher, ResidentTeacher):
            frozen = [scorer.model for scorer in self.teacher.scorers]
            scored.append((self.teacher, "signals", frozen))
        for owner, name, run in scored:
            setattr(owner, name, self._keeping(getattr(owner, name), run))

    def learn(self, micro_batches: int) -> None:
        """Teacher, student and optimizer: the trainer's own step.

        Args:
            micro_batches: to run, of those of the step.
        """
        self._missing = self.setup.work.most_micro_batches - micro_batches
        original = step.run_schedule

        def announced(model: torch.nn.Module, batches: Any, **options: Any) -> list[Any]:
            self._announce(unwrap(model).config, batches)
            return original(model, batches, **options)

        setattr(step, "run_schedule", announced)  # noqa: B010
        try:
            learn(self, trajectories(self.setup, micro_batches=micro_batches))
        finally:
            step.run_schedule = original
        with self.rehearsed.tracker.phase("between steps"):
            pass

    def export(self) -> None:
        """New weights to the engines."""
        original = weights.export_weights
        counted = Counted(original)
        setattr(weights, "export_weights", counted)  # noqa: B010
        try:
            with self.clock("sync"):
                self.sync_weights(1)
        finally:
            weights.export_weights = original
        self.engine_bytes = counted.bytes

    def save(self, *, wait: bool = False) -> None:
        """What the last checkpoint is made of, which any layout can load; nothing is written."""
        with self.clock("checkpoint"):
            state = self.checkpoints.state(
                self.student,
                extra={},
                sharding="fully_reshardable",
                is_loading=False,
            )
            self.checkpoint_bytes = bytes_to_write(state)

    def _keeping(self, score: Any, models: list[Any]) -> Any:
        """Hold as much as if the models had scored all micro-batches of the step."""

        def kept(batches: Any) -> list[Any]:
            tokens = len(batches[0].loss_at) if self.ranks.is_last_stage else 0
            room = [
                torch.empty(tokens, model.config.hidden_size, dtype=self.dtype, device=self.device)
                for model in models
                for _ in range(self._missing if tokens else 0)
            ]
            return Kept(score(batches), room)

        return kept

    def _announce(self, config: Any, micro_batches: Any) -> None:
        """Neighbours send what this stage would send: hidden states of each micro-batch."""
        ranks = self.ranks
        shards = ranks.tp_size if config.sequence_parallel else 1
        shapes = [
            (batch.tokens.shape[1] // shards, batch.tokens.shape[0], config.hidden_size)
            for batch in micro_batches
        ]
        place = {"tp_rank": ranks.tp_rank, "dp_rank": ranks.dp_rank}
        for pp_rank in (ranks.pp_rank - 1, ranks.pp_rank + 1):
            if 0 <= pp_rank < ranks.pp_size:
                self.world.expect_shapes(ranks.global_rank(pp_rank=pp_rank, **place), shapes)

    def _inputs(self) -> Inputs:
        def folder(path: str) -> ArchitectureFolder:
            return ArchitectureFolder(Path(path), self.rehearsed, self.dtype)

        made = self.setup
        return Inputs(
            student=folder(self.config.model.student),
            teacher=folder(self.config.model.teacher),
            reference=folder(self.config.reference) if self.config.reference else None,
            tokenizer=cast(Any, None),
            vocab_size=min(model.shape.vocab for model in made.models),
            context=min(model.shape.context for model in made.models),
            stop_token_ids=(),
            prompts=[],
            responses=None,
            recorded=None,
            problems=[],
            max_model_len=made.work.longest,
        )

    def _start_engines(self) -> SamplingEngines:
        original = job.make_engine
        setattr(job, "make_engine", lambda *_, **__: self.engine)  # noqa: B010
        try:
            return self.start_engines("student")
        finally:
            job.make_engine = original

    def examples_due(self) -> bool:
        """No examples: their numbers are made up."""
        return False


class _NeverStop:
    requested = False


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


def trajectories(setup: Setup, *, micro_batches: int | None = None) -> list[TokenSequence]:
    """The longest step that memory has to hold, as the planner assumes it.

    Args:
        setup: the run.
        micro_batches: of each replica; None: all of the step.
    """
    work, config = setup.work, setup.config
    count = work.trajectories
    if micro_batches is not None:
        rows = config.train.tokens_per_micro_batch // work.longest
        count = min(count, micro_batches * rows * setup.parallel.data)
    response = (1,) * work.longest_response
    taught = work.longest_response // 2 if config.guidance.responses else 0
    prompt, logprobs = (1,) * work.prompt, (-1.0,) * (work.longest_response - taught)
    return [
        TokenSequence.of_runs(
            SampleKey(
                0,
                number // config.rollout.samples_per_prompt,
                number % config.rollout.samples_per_prompt,
            ),
            (Writer.CONTEXT, prompt),
            (Writer.TEACHER, response[:taught]),
            (Writer.STUDENT, response[taught:]),
            logprobs=logprobs,
            version=0,
            fields={ADVANTAGE: 0.0},
        )
        for number in range(count)
    ]
