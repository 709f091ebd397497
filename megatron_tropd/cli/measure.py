"""Measures the student of a run outside of it, or an HF folder, for ``tropd evaluate``.

A run is measured as it measures itself: its own settings, with another student's folder and, if
asked, other problems, go through the functions that the run goes through.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GraderConfig,
    GuidanceConfig,
    LossSettings,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    load_evaluation,
)
from megatron_tropd.config.run import SELF, TEACHER
from megatron_tropd.config.run_folder import RunFolder, run_of
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.prompts import num_tokens
from megatron_tropd.distill.engines import make_engine
from megatron_tropd.distill.evaluation import (
    accuracy_of,
    asking_of,
    evaluation_settings,
    graded,
    grader_of_set,
    in_episodes,
    reverse_kl_of,
    sample_problems,
)
from megatron_tropd.distill.inputs import Inputs, ProblemSet, load_inputs
from megatron_tropd.rollout.engines.group import EngineGroup
from megatron_tropd.tasks.answer_files import file_name, header_of, read_answers, write_answers
from megatron_tropd.tasks.exact_match import Sampler
from megatron_tropd.teacher.cached.digest import model_digest

_ALL = 2**40  # problems, or tokens of a micro-batch: no limit
_ANSWER_TOKENS = 1024
"""Longest answer if neither a run nor the command says one, if the context has room for it."""


@dataclass(frozen=True)
class Overrides:
    """What the command asks for in place of the settings; None: as they are."""

    max_new_tokens: int | None = None
    num_problems: int | None = None
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    apply_chat_template: bool | None = None
    dtype: str | None = None
    data: DataConfig | None = None

    @property
    def given(self) -> list[str]:
        """Names of those that are set."""
        return [name for name, value in vars(self).items() if value is not None]

    def on(self, config: Config) -> Config:
        """The settings with these in their place, in every set."""
        of_set = ("max_new_tokens", "num_problems", "samples", "temperature", "top_p")
        measured = {name: getattr(self, name) for name in of_set}
        wrapped = {"apply_chat_template": self.apply_chat_template}
        return replace(
            config,
            model=_changed(config.model, dtype=self.dtype),
            rollout=_changed(
                config.rollout, **wrapped, max_new_tokens=self.max_new_tokens, data=self.data
            ),
            evaluation=_changed(
                config.evaluation,
                **measured,
                seed=self.seed,
                data=self.data,
                sets=tuple(_changed(s, **measured, **wrapped) for s in config.evaluation.sets),
            ),
        )


@dataclass(frozen=True)
class What:
    """What is to be measured, if not the held-out problems of the run."""

    problems: str | Path | None = None
    """File or data set."""
    sets_file: Path | None = None
    """TOML file with [[evaluation.sets]]."""
    names: tuple[str, ...] = ()
    """Of the sets that are measured; none: all."""

    def on(
        self, evaluation: EvaluationConfig, grader: GraderConfig
    ) -> tuple[EvaluationConfig, GraderConfig]:
        """Put this in the place of a run's own."""
        if self.problems and self.sets_file:
            raise ConfigError("Found both a file of problems and --sets. Give one of the two.")
        if self.sets_file:
            evaluation, grader = load_evaluation(self.sets_file)
        elif self.problems:
            evaluation = replace(
                evaluation, problems=str(self.problems), data=DataConfig(), sets=()
            )
        known = [each.name for each in evaluation.sets]
        if unknown := [name for name in self.names if name not in known]:
            raise ConfigError(
                f"--set {unknown[0]}: expected one of {', '.join(known) or 'none'}, the names in "
                "[[evaluation.sets]]."
            )
        chosen = [each for each in evaluation.sets if not self.names or each.name in self.names]
        return replace(evaluation, sets=tuple(chosen)), grader


@dataclass(frozen=True)
class How:
    """How it is measured, which changes no number but round-off."""

    out: Path | None = None
    """Folder of a file of answers for each set, continued if there; None: they are not kept."""
    engines: int | None = None
    """Side by side; None: one on each GPU (or as many as one engine takes), one without."""


def _changed(section: Any, **values: Any) -> Any:
    return replace(section, **{name: v for name, v in values.items() if v is not None})


def evaluate(
    model: Path,
    what: What | None = None,
    *,
    like: Path | None = None,
    overrides: Overrides | None = None,
    how: How | None = None,
) -> dict[str, Any]:
    """Measure the student of a run as the run does, or an HF folder.

    Args:
        model: run folder, its exported student, or any other HF folder.
        like: a run whose settings are used for an HF folder.

    Returns:
        The result (``accuracy`` or ``reverse_kl`` with their companions) and ``settings``, or, of
        sets with names, ``sets`` with these of each; ``model``, ``settings_from``, the names in
        ``overridden``, and ``notes``.

    Raises:
        InputError: a folder or file is missing or unusable.
        ConfigError: a setting does not fit the model or the problems.
    """
    overrides, what = overrides or Overrides(), what or What()
    if what.sets_file and overrides.data is not None:
        raise ConfigError("Found --data beside --sets, whose file says what of each is read.")
    run, folder = run_of(model), model
    if run is not None:
        folder = _student_of(run)
    source = run_of(like) if like else run
    if like and source is None:
        raise InputError(f"{like} is no run folder: give one that `tropd distill` wrote (run.dir).")
    notes: list[str] = []
    if source is not None:
        config = overrides.on(_as_in_run(source, folder, what, notes))
    else:
        config = _assumed(folder, what, overrides, notes)
    inputs = load_inputs(config)
    found = {
        each.name: record | {"settings": evaluation_settings(config, inputs, each)}
        for each, record in _measure(config, inputs, folder, source, how or How())
    }
    return {
        **found.get("", {"sets": found}),
        "model": str(folder),
        "settings_from": str(source.config) if source else "defaults: the folder is of no run",
        "overridden": overrides.given,
        "notes": notes,
    }


def _student_of(run: RunFolder) -> Path:
    if not run.student.is_dir():
        raise InputError(
            f"Run {run.root} has no trained student yet: {run.student} is missing. Let the run "
            "finish (the same command resumes it) or give an HF folder."
        )
    return run.student


def _as_in_run(run: RunFolder, folder: Path, what: What, notes: list[str]) -> Config:
    """The settings of a run, for one engine that answers problems and for nothing else."""
    # The student's engine reads of its teachers how long sequences may be, and the vocabulary.
    config = next(iter(run.read_config().by_teacher.values()))
    evaluation, grader = what.on(config.evaluation, config.grader)
    if not evaluation.measures:
        raise ConfigError(
            f"Run {run.root} has no held-out problems ([evaluation] names none): give a file."
        )
    teacher = config.model.teacher
    if not Path(teacher).exists():
        notes.append(
            f"The teacher {teacher} is gone: context and vocabulary are those of the student alone."
        )
        teacher = str(folder)
    # What "auto" was on the machine of the run.
    dtype = (run.read_summary() or {}).get("dtype", config.model.dtype)
    config = replace(
        config,
        model=replace(config.model, student=str(folder), teacher=teacher, dtype=dtype),
        parallel=ParallelConfig(),
        rollout=replace(
            config.rollout,
            prompts_per_step=1,
            placement="colocated",
            weight_transport="auto",
            num_engines=1,
            steps_ahead=0,
        ),
        teacher=_read_alone(config.teacher),
        guidance=GuidanceConfig(prefixed_per_prompt=0),
        loss=_without_golden(config.loss),
        # Nothing is trained, and some options do not go with one rank.
        megatron=MegatronConfig(),
        run=replace(config.run, checkpoint_sharding=RunConfig.checkpoint_sharding),
        train=replace(config.train, tokens_per_micro_batch=_ALL),
        evaluation=evaluation,
        grader=grader,
    )
    return _asks_problems(config)


def _asks_problems(config: Config) -> Config:
    """The settings with the problems of the first set in the place of the prompts."""
    completed = config.evaluation_sets
    first = completed[0]
    form = vars(first.prompts_as(config.rollout))
    # Other sets keep the form that they had from the run's prompts, or from their tasks.
    kept = ("apply_chat_template", "system_prompt", "prompt_template")
    sets = tuple(
        replace(
            each,
            of_task=None,
            **{n: v for n, v in vars(each.prompts_as(config.rollout)).items() if n in kept},
        )
        for each in completed
    )
    room = first.max_new_tokens or 1
    return replace(
        config,
        rollout=replace(
            config.rollout,
            **form,
            prompts=first.problems,
            data=first.data,
            max_new_tokens=room,
            first_new_tokens=None,
            growth_steps=0,
        ),
        evaluation=replace(
            config.evaluation,
            max_new_tokens=config.evaluation.max_new_tokens or config.rollout.max_new_tokens,
            sets=sets if config.evaluation.sets else (),
        ),
        tasks=(),
    )


def _read_alone(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher as a folder, of which length and vocabulary count, whatever a run makes of it."""
    teacher = replace(teacher, context=None, parallel=None)
    if teacher.placement != SELF:
        return teacher
    return replace(teacher, placement=TeacherConfig.placement, ema_decay=None)


def _without_golden(loss: LossSettings) -> LossSettings:
    """The loss, which says what ends a response, if held-out problems have no golden answers."""
    has_weight = loss.needs.golden and hasattr(loss, "golden_weight")
    none: dict[str, Any] = {"golden_weight": 0.0}
    return replace(loss, **none) if has_weight else loss


def _assumed(folder: Path, what: What, overrides: Overrides, notes: list[str]) -> Config:
    """Settings for a folder of which no run says any."""
    evaluation, grader = what.on(EvaluationConfig(num_problems=_ALL), GraderConfig())
    if not evaluation.measures:
        raise ConfigError(f"{folder} is no run folder, so it has no problems: give a file.")
    sized = [evaluation.max_new_tokens, *(each.max_new_tokens for each in evaluation.sets)]
    if not any(sized):
        evaluation = replace(evaluation, max_new_tokens=1)
    config = overrides.on(
        _asks_problems(
            Config(
                model=ModelConfig(student=str(folder), teacher=str(folder)),
                rollout=RolloutConfig(
                    prompts=str(folder), max_new_tokens=1, prompts_per_step=1, engine_cpu_kv_gib=1.0
                ),
                guidance=GuidanceConfig(prefixed_per_prompt=0),
                train=TrainConfig(steps=1, tokens_per_micro_batch=_ALL),
                evaluation=evaluation,
                grader=grader,
                run=RunConfig(dir="."),
            )
        )
    )
    inputs = load_inputs(config)
    asked = overrides.apply_chat_template is not None or what.sets_file is not None
    if inputs.tokenizer.chat_template and not asked:
        notes.append(
            "The folder has a chat template, in which plain prompts were not wrapped. "
            "--chat-template does it; --like RUN does as a run did."
        )
    if overrides.max_new_tokens is not None or any(sized):
        return config
    longest = max(max(num_tokens(each.problems)) for each in inputs.problem_sets)
    return replace(overrides, max_new_tokens=min(_ANSWER_TOKENS, inputs.context - longest)).on(
        config
    )


def _measure(
    config: Config, inputs: Inputs, folder: Path, source: RunFolder | None, how: How
) -> list[tuple[ProblemSet, dict[str, Any]]]:
    """The record of each set."""
    teacher, sets = _teacher_folder(config, inputs, source), inputs.problem_sets
    with ExitStack() as exits:
        scratch = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        count = how.engines or _engines_here(config)
        started: list[Sampler] = []

        def engine() -> Sampler:
            if not started:
                started.append(
                    exits.enter_context(_engines(config, inputs, folder, count, scratch))
                )
            return started[0]

        if teacher is not None:
            asked = [(each, each.problems) for each in sets]
            samples = sample_problems(config, inputs, engine(), asked)
            exits.close()  # the engine's memory is free for the two models
            pairs = zip(sets, samples, strict=True)
            return [(s, reverse_kl_of(inputs, s, drawn, folder, teacher)) for s, drawn in pairs]
        out, model = how.out or scratch, model_digest(HFFolder(folder))
        return [(each, _answered(config, inputs, each, engine, out, model, count)) for each in sets]


def _answered(
    config: Config,
    inputs: Inputs,
    each: ProblemSet,
    engine: Callable[[], Sampler],
    out: Path,
    model: str,
    engines: int,
) -> dict[str, Any]:
    """Complete the file of answers to a set; its record."""
    path, asking = out / file_name(each.name), asking_of(config, inputs, each)
    if in_episodes(config, each):
        (samples,) = sample_problems(config, inputs, engine(), [(each, each.problems)])
        record = graded(config, inputs, each, samples, path, model)
        del record["examples"]
        return record

    def told(done: int, total: int) -> None:
        print(f"{path.stem}: {done} of {total} answers", file=sys.stderr, flush=True)

    write_answers(
        engine,
        each.problems,
        asking,
        inputs.tokenizer,
        grader_of_set(each),
        path,
        header=header_of(
            each.name, each.problems, evaluation_settings(config, inputs, each), model
        ),
        engines=engines,
        progress=told,
    )
    record = accuracy_of(each, read_answers(path).responses, asking.samples)
    del record["examples"]
    return record


def _engines_here(config: Config) -> int:
    """As many engines as this machine's GPUs hold; one without."""
    return max(1, torch.cuda.device_count() // config.rollout.engine_tensor_parallel)


def _engines(config: Config, inputs: Inputs, folder: Path, count: int, logs: Path) -> EngineGroup:
    """Engines side by side, each on GPUs (or threads) of its own."""

    def make(number: int, threads: int) -> Any:
        log_file = logs / f"engine_{number:03d}.log"
        return make_engine(config, inputs, folder, log_file=log_file, threads=threads, alone=True)

    return EngineGroup(count, make, tensor_parallel=config.rollout.engine_tensor_parallel)


def _teacher_folder(config: Config, inputs: Inputs, source: RunFolder | None) -> Path | None:
    """HF folder of the teacher, if the task needs it."""
    if config.evaluation.task == "exact_match" or source is None:
        return None
    (wanted,) = (alone.model.teacher for alone in source.read_config().by_teacher.values())
    if config.model.teacher != wanted:
        raise InputError(
            f'evaluation.task = "reverse_kl" compares with the teacher {wanted}, which is gone. '
            "Put it back."
        )
    teacher = inputs.folders[TEACHER]
    megatron = isinstance(teacher, MegatronFolder)
    return source.initial_hf / TEACHER if megatron else teacher.path


def result_lines(result: dict[str, Any]) -> Sequence[str]:
    """A result for the terminal: the numbers, then what they were measured with."""
    sets = result.get("sets", {"": result})
    lines = []
    for name, record in sets.items():
        settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
        numbers = [f"{name}: {line}" if name else line for line in _numbers(record)]
        lines += [*numbers, f"with {settings}"]
    asked = f"; of this command: {', '.join(result['overridden'])}" if result["overridden"] else ""
    return [*lines, f"from {result['settings_from']}{asked}", *result["notes"]]


def _numbers(record: dict[str, Any]) -> list[str]:
    low, high = record["ci_low"], record["ci_high"]
    if "accuracy" not in record:
        return [
            f"reverse KL {record['reverse_kl']:.4f} nats a token (95 % interval {low:.4f} .. "
            f"{high:.4f}), {record['tokens']} tokens"
        ]
    samples = record["settings"].get("samples", 1)
    name = "accuracy" if samples == 1 else f"avg@{samples}"
    numbers = f"{_percent(name, record['accuracy'], low, high)}, {record['correct']} of "
    numbers += f"{record['total']}"
    if record["unjudged"]:
        numbers += f"; {record['unjudged']} cannot be judged and count as not correct"
    if record["grader_errors"]:
        numbers += f"; the grader failed at {record['grader_errors']}, which do not count"
    further = [
        _percent(name, record[name], *ends) for name, ends in record.get("intervals", {}).items()
    ]
    length, cut = record["response_length"], record["truncated_share"]
    return [numbers, *further, f"answers of {length:.0f} tokens, {cut:.1%} cut off"]


def _percent(name: str, value: float, low: float, high: float) -> str:
    return f"{name} {100 * value:.1f} % (95 % interval {100 * low:.1f} .. {100 * high:.1f} %)"
