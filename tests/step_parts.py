"""The parts of a distillation step without a run: two tiny models, no engines, no folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tropd.config import (
    Config,
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

BETA = 0.5
SEED = 7


def build_parts(
    student: str | Path,
    teacher: str | Path,
    layout: ParallelConfig,
    train: TrainConfig,
    loss: LossSettings,
    *,
    dtype: str = "float32",
    megatron: MegatronConfig | None = None,
    source: TeacherConfig | None = None,
    ranks: Any = None,
    **changes: Any,
) -> Any:
    """Process groups, both models, and what a step is made with (``StepParts``); collective.

    Args:
        student: HF folder.
        teacher: HF folder.
        layout: of both.
        train: the optimizer's settings.
        loss: of the run.
        dtype: of both.
        megatron: further options.
        source: settings of the teacher's.
        ranks: if there are process groups already.
        changes: other fields of ``StepParts``.
    """
    # Not at the top: ranks and tests that need no Megatron import this module, too.
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.distill.pair import step_parts
    from megatron_tropd.mcore import parallel

    config = config_of_parts(
        student, teacher, layout, train, loss, dtype=dtype, megatron=megatron, source=source
    )
    ranks = ranks or parallel.initialize(layout, seed=1)
    folders = {"student": HFFolder(Path(student)), "teacher": HFFolder(Path(teacher))}
    if config.reference is not None:
        folders["reference"] = HFFolder(Path(config.reference))
    return replace(step_parts(config, folders, ranks), **changes)


def config_of_parts(
    student: str | Path,
    teacher: str | Path,
    layout: ParallelConfig,
    train: TrainConfig,
    loss: LossSettings,
    *,
    dtype: str = "float32",
    megatron: MegatronConfig | None = None,
    source: TeacherConfig | None = None,
) -> Config:
    """What :func:`build_parts` is given, as a run's settings."""
    return Config(
        model=ModelConfig(student=str(student), teacher=str(teacher), dtype=dtype),
        parallel=layout,
        rollout=RolloutConfig(prompts="", max_new_tokens=1),
        guidance=GuidanceConfig(beta=BETA),
        loss=loss,
        train=replace(train, seed=SEED),
        run=RunConfig(dir="."),
        megatron=megatron or MegatronConfig(),
        teacher=source or TeacherConfig(),
    )
