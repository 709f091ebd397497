"""The parts of a run on one rank, and the order in which they are built."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from megatron_tropd.base.progress import Progress, StopFlag
from megatron_tropd.config import Config
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.collective import run_everywhere
from megatron_tropd.data.mixing import Mixing
from megatron_tropd.data.samples import Sample
from megatron_tropd.distill import startup
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.distill.engines import make_engine, start_engines
from megatron_tropd.distill.evaluation import Evaluator
from megatron_tropd.distill.inputs import Inputs, ProblemSet, load_inputs
from megatron_tropd.distill.pair import step_parts
from megatron_tropd.distill.reporter import Reporter, say
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore import models, platform
from megatron_tropd.mcore.checkpoint import Checkpoints
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.rollout.engines.device_memory import free_bytes, wait_for_memory
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.engines.wire import Model
from megatron_tropd.rollout.environments import SharedEnvironments, shared_environments
from megatron_tropd.rollout.episodes import EpisodePlan, load_mode
from megatron_tropd.rollout.recorded import RecordedRollouts
from megatron_tropd.rollout.source import Mixture, RolloutSource, SampledRollouts
from megatron_tropd.rollout.warmup import WarmupEngines
from megatron_tropd.teacher import TeacherSource
from megatron_tropd.teacher.separate import SeparateTeacher


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run; what changes from step to step is in ``progress`` and in the parts."""

    config: Config
    folder: RunFolder
    inputs: Inputs
    layout: Layout
    stop: StopFlag
    """Whether the run was asked to stop."""
    progress: Progress
    """Steps done, and where this rank is."""
    reporter: Reporter
    checkpoints: Checkpoints
    hf_folders: dict[str, Path]
    """The first weights of student and teachers, as HF folders."""
    evaluator: Evaluator
    engines: SamplingEngines
    """Of the student."""
    rollouts: RolloutSource
    parts: StepParts
    """What a step is made with: student and teacher among them."""


@contextmanager
def open_session(
    folder: RunFolder, *, console: IO[str], stop: StopFlag, progress: Progress
) -> Iterator[Session]:
    """Build the parts of a run, until the block is left; nothing is trained yet.

    Args:
        stop: set when the run was asked to stop.
        progress: holds the step and the phase, for the watchdog.

    Raises:
        ConfigError, InputError: the run cannot start.
    """
    config = folder.read_config()
    tell = partial(say, console)
    with ExitStack() as exits:
        layout = startup.join_ranks(config)
        exits.push(startup.leave_ranks)
        inputs = load_inputs(config)
        is_main = layout.is_main
        startup.check_settings(config, inputs, is_main=is_main, say=tell)
        checkpoints = Checkpoints(
            folder.checkpoints,
            keep=config.run.keep_checkpoints,
            layout=layout,
            distributed_optimizer=config.parallel.distributed_optimizer,
            say=tell,
        )
        hf_folders = startup.hf_folders(config, inputs, folder, is_main=is_main)
        reporter = exits.enter_context(
            Reporter(config, inputs, folder, console=console, progress=progress, is_main=is_main)
        )
        evaluator = Evaluator(config, inputs, folder, is_main=is_main, log=reporter.log)

        def engines_of(who: str, teacher: Path | None = None) -> SamplingEngines:
            model: Model = "student" if who == "student" else "teacher"
            if is_main and platform.has_cuda():
                tell(startup.engines_start(model, config, folder))
            return start_engines(
                model,
                config,
                folder,
                partial(make_engine, config, inputs, hf_folders[who]),
                rank=layout.rank,
                world_size=layout.world_size,
                teacher=teacher,
                stopping=lambda: stop.requested,
            )

        if due := evaluator.teachers_due():
            _measure_teachers(evaluator, reporter, due, engines_of)
        engines = exits.enter_context(_students_engines(config, engines_of, hf_folders))
        if platform.has_cuda():
            with engines.awake():
                pass  # vLLM measures free memory while it starts: nobody else may allocate
        shared = exits.enter_context(shared_environments(config) or nullcontext())
        longest = inputs.longest_read(config.rollout)
        parts = step_parts(config, inputs.folders, layout, inputs.routes, longest=longest)
        exits.push(partial(_leave, parts.teacher))
        checkpoints.check_memory(parts.student)
        rollouts = rollout_source(config, inputs, engines, environments=shared, is_main=is_main)
        _let_score_ahead(parts.teacher, rollouts, config.train.steps)
        gap = _engine_gap(config, inputs, folder)
        parts = replace(parts, clock=reporter.clock, engine_gap=gap, tasks=inputs.tasks)
        yield Session(
            config=config,
            folder=folder,
            inputs=inputs,
            layout=layout,
            stop=stop,
            progress=progress,
            reporter=reporter,
            checkpoints=checkpoints,
            hf_folders=hf_folders,
            evaluator=evaluator,
            engines=engines,
            rollouts=rollouts,
            parts=parts,
        )


def _students_engines(
    config: Config, start: Callable[..., SamplingEngines], hf_folders: Mapping[str, Path]
) -> SamplingEngines:
    """Start the engines that sample with the student's weights, at first beside the teacher's."""
    engines = start("student")
    if not config.rollout.asks_teacher:
        return engines
    blended = partial(start, "student", hf_folders["teacher"])
    return WarmupEngines(engines, blended, config.rollout.warmup_steps)


def _leave(teacher: TeacherSource, kind: type[BaseException] | None, *_: object) -> None:
    """Let a teacher go; not one on ranks of its own after an error.

    Those may wait in the middle of an exchange, and would not hear it; they end with the job.
    """
    if kind is None or not isinstance(teacher, SeparateTeacher):
        teacher.close()


def _let_score_ahead(teacher: TeacherSource, rollouts: RolloutSource, steps: int) -> None:
    """Let a teacher on ranks of its own score the samples of the next step."""
    if isinstance(teacher, SeparateTeacher):
        teacher.look_ahead(lambda step: rollouts.arrived(step) if step < steps else None)


def _measure_teachers(
    evaluator: Evaluator,
    reporter: Reporter,
    sets: Sequence[ProblemSet],
    start: Callable[[str], SamplingEngines],
) -> None:
    """Grade the teachers while nobody else has models on the devices; once in a run."""
    before = free_bytes()
    with reporter.clock("evaluation"):
        answers: list[dict[int, list[Sample]]] = [{} for _ in sets]
        for who in dict.fromkeys(who for each in sets for who in each.of_teachers):
            if any(each.of_teachers.get(who) for each in sets):
                with start(who) as engines:
                    mine = evaluator.answers_of(engines, sets, who)
                run_everywhere(lambda: wait_for_memory(before, "the teacher's engine"))
                answers = [known | new for known, new in zip(answers, mine, strict=True)]
        for each, found in zip(sets, answers, strict=True):
            evaluator.measure_teacher(each, found)


def rollout_source(
    config: Config,
    inputs: Inputs,
    engines: SamplingEngines,
    *,
    environments: SharedEnvironments | None = None,
    is_main: bool,
) -> RolloutSource:
    """Where the run's sequences come from: records, or engines in the mode that is set."""
    if inputs.recorded is not None:
        per_step = config.rollout.prompts_per_step
        return RecordedRollouts(inputs.recorded, prompts_per_step=per_step, seed=config.train.seed)
    plan = EpisodePlan(
        config.rollout,
        config.guidance,
        config.train.steps,
        config.train.seed,
        inputs.responses,
        inputs.golden,
        config.talks_to,
        inputs.talk,
    )
    return SampledRollouts(
        engines,
        load_mode(config.rollout.mode),
        inputs.prompts,
        plan,
        stop_token_ids=inputs.turn_stops,
        shared_stops=inputs.shared_stops,
        mixture=_mixture(config, inputs, plan),
        environments=environments,
        is_main=is_main,
    )


def _mixture(config: Config, inputs: Inputs, plan: EpisodePlan) -> Mixture | None:
    """How several tasks are sampled; None: there is one."""
    if inputs.tasks is None:
        return None
    episodes = []
    for task, rollout in zip(config.tasks, config.rollouts, strict=True):
        responses = None if task.responses is None else inputs.responses
        mine = replace(plan, rollout=rollout, responses=responses)
        episodes.append((load_mode(rollout.mode), mine))
    per_step, seed = config.rollout.prompts_per_step, config.train.seed
    return Mixture(episodes, Mixing(inputs.tasks, per_step=per_step, seed=seed))


def _engine_gap(config: Config, inputs: Inputs, folder: RunFolder) -> EngineGap:
    lora = config.model.lora
    return EngineGap(
        config.rollout.max_engine_gap,
        models.resolve_dtype(config.model.dtype),
        advice=f"Compare the config.json in {inputs.student.companions} with the one at the top "
        f"of the engine's log in {folder.logs}, and both with transformers' log-probs of the "
        "same tokens.",
        dropout=lora is not None and lora.dropout > 0,
    )
