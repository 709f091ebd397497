"""The parts of a distillation step without a run: two tiny models, no engines, no folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tropd.config import (
    Config,
    GuidanceConfig,
    LoraConfig,
    LossSettings,
    MegatronConfig,
    ModelConfig,
    NamedTeacher,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_tropd.config.run import reference_of

BETA = 0.5
SEED = 7


def build_parts(
    student: str | Path,
    teacher: str | Path | tuple[NamedTeacher, ...],
    layout: ParallelConfig,
    train: TrainConfig,
    loss: LossSettings,
    *,
    dtype: str = "float32",
    megatron: MegatronConfig | None = None,
    source: TeacherConfig | None = None,
    ranks: Any = None,
    routes: Any = None,
    recorded: str | None = None,
    lora: LoraConfig | None = None,
    **changes: Any,
) -> Any:
    """Process groups, both models, and what a step is made with (``StepParts``); collective.

    Args:
        student: HF folder.
        teacher: HF folder; or several teachers.
        layout: of both.
        train: the optimizer's settings.
        loss: of the run.
        dtype: of both.
        megatron: further options.
        source: settings of the teacher's.
        ranks: if there are process groups already.
        routes: whose the prompts are, of several teachers.
        recorded: what the settings call the recorded rollouts.
        lora: adapters of the student.
        changes: other fields of ``StepParts``.
    """
    # Not at the top: ranks and tests that need no Megatron import this module, too.
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.distill.pair import step_parts
    from megatron_tropd.mcore import parallel

    config = config_of_parts(
        student,
        teacher,
        layout,
        train,
        loss,
        dtype=dtype,
        megatron=megatron,
        source=source,
        recorded=recorded,
        lora=lora,
    )
    ranks = ranks or parallel.initialize(layout, seed=1)
    folders = {"student": HFFolder(Path(student))}
    for who, alone in config.by_teacher.items():
        folders[who] = HFFolder(Path(alone.model.teacher))
        if alone.reference is not None:
            folders[reference_of(who)] = HFFolder(Path(alone.reference))
    return replace(step_parts(config, folders, ranks, routes), **changes)


def config_of_parts(
    student: str | Path,
    teacher: str | Path | tuple[NamedTeacher, ...],
    layout: ParallelConfig,
    train: TrainConfig,
    loss: LossSettings,
    *,
    dtype: str = "float32",
    megatron: MegatronConfig | None = None,
    source: TeacherConfig | None = None,
    recorded: str | None = None,
    lora: LoraConfig | None = None,
) -> Config:
    """What :func:`build_parts` is given, as a run's settings."""
    several = teacher if isinstance(teacher, tuple) else ()
    return Config(
        model=ModelConfig(
            student=str(student),
            teacher="" if several else str(teacher),
            dtype=dtype,
            lora=lora,
        ),
        teachers=several,
        parallel=layout,
        rollout=RolloutConfig(prompts="none", max_new_tokens=1, recorded=recorded),
        guidance=GuidanceConfig(beta=BETA),
        loss=loss,
        train=replace(train, seed=SEED),
        run=RunConfig(dir="."),
        megatron=megatron or MegatronConfig(),
        teacher=source or TeacherConfig(),
    )
