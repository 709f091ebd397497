"""Measures the student of a run outside of it, or an HF folder, for ``tropd evaluate``.

A run is measured as it measures itself: its own settings, with another student's folder and, if
asked, other problems, go through the functions that the run goes through.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GuidanceConfig,
    LossSettings,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_tropd.config.run import SELF, TEACHER
from megatron_tropd.config.run_folder import RunFolder, run_of
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.prompts import num_tokens
from megatron_tropd.distill.engines import make_engine
from megatron_tropd.distill.evaluation import (
    accuracy_of,
    evaluation_settings,
    reverse_kl_of,
    sample_problems,
)
from megatron_tropd.distill.inputs import Inputs, load_inputs

_ALL = 2**40  # problems, or tokens of a micro-batch: no limit
_ANSWER_TOKENS = 1024
"""Longest answer if neither a run nor the command says one, if the context has room for it."""


@dataclass(frozen=True)
class Overrides:
    """What the command asks for in place of the settings; None: as they are."""

    max_new_tokens: int | None = None
    num_problems: int | None = None
    apply_chat_template: bool | None = None
    dtype: str | None = None
    data: DataConfig | None = None

    @property
    def given(self) -> list[str]:
        """Names of those that are set."""
        return [name for name, value in vars(self).items() if value is not None]

    def on(self, config: Config) -> Config:
        """The settings with these in their place."""
        evaluation = {
            "max_new_tokens": self.max_new_tokens,
            "num_problems": self.num_problems,
            "data": self.data,
        }
        return replace(
            config,
            model=_changed(config.model, dtype=self.dtype),
            rollout=_changed(
                config.rollout,
                apply_chat_template=self.apply_chat_template,
                max_new_tokens=self.max_new_tokens,
                data=self.data,
            ),
            evaluation=_changed(config.evaluation, **evaluation),
        )


def _changed(section: Any, **values: Any) -> Any:
    return replace(section, **{name: v for name, v in values.items() if v is not None})


def evaluate(
    model: Path,
    problems: str | Path | None = None,
    *,
    like: Path | None = None,
    overrides: Overrides | None = None,
) -> dict[str, Any]:
    """Measure the student of a run as the run does, or an HF folder.

    Args:
        model: run folder, its exported student, or any other HF folder.
        problems: file or data set of held-out problems; None: those of the run.
        like: a run whose settings are used for an HF folder.

    Returns:
        The result (``accuracy`` or ``reverse_kl`` with their companions), ``model``, ``settings``,
        ``settings_from``, the names in ``overridden``, and ``notes``.

    Raises:
        InputError: a folder or file is missing or unusable.
        ConfigError: a setting does not fit the model or the problems.
    """
    overrides = overrides or Overrides()
    run, folder = run_of(model), model
    if run is not None:
        folder = _student_of(run)
    source = run_of(like) if like else run
    if like and source is None:
        raise InputError(f"{like} is no run folder: give one that `tropd distill` wrote (run.dir).")
    notes: list[str] = []
    if source is not None:
        config = overrides.on(_as_in_run(source, folder, problems, notes))
    else:
        config = _assumed(folder, problems, overrides, notes)
    inputs = load_inputs(config)
    return {
        **_measure(config, inputs, folder, source),
        "model": str(folder),
        "settings": evaluation_settings(config, inputs),
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


def _as_in_run(
    run: RunFolder, folder: Path, problems: str | Path | None, notes: list[str]
) -> Config:
    """The settings of a run, for one engine that answers problems and for nothing else."""
    # The student's engine reads of its teachers how long sequences may be, and the vocabulary.
    config = next(iter(run.read_config().by_teacher.values()))
    path = str(problems) if problems else config.evaluation.problems
    data = DataConfig() if problems else config.evaluation.data
    if path is None:
        raise ConfigError(
            f"Run {run.root} has no held-out problems (evaluation.problems is unset): give a file."
        )
    teacher = config.model.teacher
    if not Path(teacher).exists():
        notes.append(
            f"The teacher {teacher} is gone: context and vocabulary are those of the student alone."
        )
        teacher = str(folder)
    # What "auto" was on the machine of the run.
    dtype = (run.read_summary() or {}).get("dtype", config.model.dtype)
    room = config.max_answer_tokens
    return replace(
        config,
        model=replace(config.model, student=str(folder), teacher=teacher, dtype=dtype),
        parallel=ParallelConfig(),
        rollout=replace(
            config.rollout,
            prompts=path,
            data=data,
            max_new_tokens=room,
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
        evaluation=replace(config.evaluation, problems=path, data=data, max_new_tokens=room),
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


def _assumed(
    folder: Path, problems: str | Path | None, overrides: Overrides, notes: list[str]
) -> Config:
    """Settings for a folder of which no run says any."""
    if problems is None:
        raise ConfigError(f"{folder} is no run folder, so it has no problems: give a file.")
    config = overrides.on(
        Config(
            model=ModelConfig(student=str(folder), teacher=str(folder)),
            rollout=RolloutConfig(
                prompts=str(problems),
                max_new_tokens=1,
                prompts_per_step=1,
                engine_cpu_kv_gib=1.0,
            ),
            guidance=GuidanceConfig(prefixed_per_prompt=0),
            train=TrainConfig(steps=1, tokens_per_micro_batch=_ALL),
            evaluation=EvaluationConfig(problems=str(problems), num_problems=_ALL),
            run=RunConfig(dir="."),
        )
    )
    inputs = load_inputs(config)
    if inputs.tokenizer.chat_template and overrides.apply_chat_template is None:
        notes.append(
            "The folder has a chat template, in which plain prompts were not wrapped. "
            "--chat-template does it; --like RUN does as a run did."
        )
    if overrides.max_new_tokens is not None:
        return config
    room = min(_ANSWER_TOKENS, inputs.context - max(num_tokens(inputs.problems)))
    return replace(overrides, max_new_tokens=room).on(config)


def _measure(
    config: Config, inputs: Inputs, folder: Path, source: RunFolder | None
) -> dict[str, Any]:
    teacher = _teacher_folder(config, inputs, source)
    with tempfile.TemporaryDirectory() as logs:
        log_file = Path(logs) / "engine.log"
        with make_engine(config, inputs, folder, log_file=log_file, alone=True) as engine:
            samples = sample_problems(config, inputs, engine)
    if teacher is not None:
        return reverse_kl_of(inputs, samples, folder, teacher)
    record = accuracy_of(config, inputs, samples)
    del record["examples"]
    return record


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
    if "accuracy" in result:
        low, high = 100 * result["ci_low"], 100 * result["ci_high"]
        numbers = (
            f"accuracy {100 * result['accuracy']:.1f} % (95 % interval {low:.1f} .. {high:.1f} %), "
            f"{result['correct']} of {result['total']}"
        )
        if result["unjudged"]:
            numbers += f"; {result['unjudged']} cannot be judged and count as not correct"
        if result["grader_errors"]:
            numbers += f"; the grader failed at {result['grader_errors']}, which do not count"
    else:
        numbers = (
            f"reverse KL {result['reverse_kl']:.4f} nats a token (95 % interval "
            f"{result['ci_low']:.4f} .. {result['ci_high']:.4f}), {result['tokens']} tokens"
        )
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    asked = f"; of this command: {', '.join(result['overridden'])}" if result["overridden"] else ""
    return [numbers, f"with {settings}", f"from {result['settings_from']}{asked}", *result["notes"]]
