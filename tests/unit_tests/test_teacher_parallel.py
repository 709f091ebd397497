"""[teacher.parallel] as a setting: what fits, what is refused in which words, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import (
    Config,
    ModelConfig,
    ModelParallelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from megatron_tropd.config.run_folder import open_run
from megatron_tropd.convert.checks import check_parallel
from megatron_tropd.distill.inputs import _check_micro_batch
from megatron_tropd.planning import memory
from megatron_tropd.planning.hardware import load_hardware
from megatron_tropd.planning.memory import memory_of_stage
from megatron_tropd.planning.planned_run import PlannedRun, plan_run

SHAPE = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "qwen3_8b.toml"
"""TP 2 x PP 2 x DP 8, a teacher of 64 layers."""


def _config(own: ModelParallelConfig | None, **student: int) -> Config:
    return Config(
        model=ModelConfig(student="/s", teacher="/t"),
        parallel=ParallelConfig(**student),
        rollout=RolloutConfig(prompts="/p", max_new_tokens=1, prompts_per_step=8),
        train=TrainConfig(steps=1),
        run=RunConfig(dir="/r"),
        teacher=TeacherConfig(parallel=own),
    )


def test_replicas_follow_from_the_world():
    own = ModelParallelConfig(tensor=2, context=2)
    found = _config(own, tensor=4, data=2).teacher_parallel
    assert (found.tensor, found.context, found.pipeline, found.data) == (2, 2, 1, 2)
    assert found.world_size == 8
    config = _config(None, tensor=4, data=2)
    assert config.teacher_parallel is config.parallel
    assert config.parallel_of("reference") is config.parallel


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(tensor=3), ["tensor x context x pipeline = 3 x 1 x 1 = 3", "8 ranks of the run"]),
        (dict(tensor=16), ["[teacher.parallel]", "= 16 ranks"]),
        (
            dict(expert=3),
            ["teacher.parallel.expert = 3 must divide teacher.parallel.data, found 8"],
        ),
        (dict(sequence_parallel=True), ["teacher.parallel.sequence_parallel", "at least 2"]),
        (dict(tensor=4, expert_tensor=2), ["teacher.parallel.expert_tensor must be 1 or"]),
        (dict(tensor=0), ["teacher.parallel.tensor must be at least 1, found 0"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(own: dict[str, int], words: list[str]):
    with pytest.raises(ConfigError) as refused:
        _config(ModelParallelConfig(**own), tensor=2, data=4)
    for word in words:
        assert word in str(refused.value)


def test_a_teacher_that_is_not_on_the_ranks_has_no_layout_there():
    own = TeacherConfig(parallel=ModelParallelConfig(), placement="cached", cache="/c")
    config = _config(None)
    with pytest.raises(ConfigError, match=r"lays out a model on the ranks of the job"):
        replace(config, teacher=own, rollout=replace(config.rollout, recorded="/r"))


def test_each_model_must_fit_its_own_layout():
    config = _config(ModelParallelConfig(tensor=4), tensor=8)
    check_parallel(SHAPE, config.parallel_of("teacher"), who="teacher")
    with pytest.raises(ConfigError, match=r"^parallel.tensor = 8 must divide the student's key"):
        check_parallel(SHAPE, config.parallel_of("student"), who="student")
    config = _config(ModelParallelConfig(tensor=8), tensor=4, data=2)
    check_parallel(SHAPE, config.parallel_of("student"), who="student")
    with pytest.raises(ConfigError, match=r"^teacher.parallel.tensor = 8 must divide the teacher"):
        check_parallel(SHAPE, config.parallel_of("teacher"), who="teacher")


def test_the_table_survives_files(tmp_path):
    config = _config(ModelParallelConfig(tensor=2, pipeline=2), tensor=4)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    written = tmp_path / "config.toml"
    written.write_text(config_to_toml(config))
    assert load_config(written) == config
    other = load_config(written, ["teacher.parallel.tensor=1"])
    assert other.teacher.parallel == ModelParallelConfig(pipeline=2)
    with pytest.raises(ConfigError, match=r"Unknown config key teacher.parallel.data"):
        load_config(written, ["teacher.parallel.data=2"])


def _planned(*overrides: str) -> PlannedRun:
    return plan_run(load_config(RECIPE, overrides), load_hardware("h100"))


def test_plans_count_the_teacher_in_its_own_layout():
    alike, run = _planned(), _planned("teacher.parallel.tensor=8", "teacher.parallel.pipeline=2")
    teacher, columns = run.teacher, run.padded_vocab
    whole = teacher.parameters
    # Two stages and two tensor-parallel ranks become eight: a quarter, norms aside.
    assert run.frozen_on(teacher, 0) == pytest.approx(
        alike.frozen_on(alike.teacher, 0) / 4, rel=1e-3
    )
    # The output layer lies on the student's columns, the teacher's own eighth is gone.
    last = run.scoring.parameters_of(teacher, 1).total
    moved = columns // 2 * teacher.shape.hidden - columns // 8 * teacher.shape.hidden
    assert run.frozen_on(teacher, 1) == last + moved
    assert run.scoring.parallel.data == 2
    assert 8 * (run.frozen_on(teacher, 0) + last) == pytest.approx(whole, rel=1e-3)
    assert memory_of_stage(run, 0).teacher_weights == 2 * run.frozen_on(teacher, 0)
    # What a rank keeps of the teacher's states is what it computes the loss of.
    kept = memory_of_stage(alike, 1).teacher_hidden
    assert memory_of_stage(run, 1).teacher_hidden == kept > 0
    assert alike.scoring is alike


def test_a_run_may_go_on_in_another_layout_of_its_teacher(tmp_path: Path):
    first = _config(None, data=2)
    first = replace(first, run=RunConfig(dir=str(tmp_path / "run")))
    open_run(first)
    open_run(replace(first, teacher=TeacherConfig(parallel=ModelParallelConfig(tensor=2))))


def test_a_row_must_fit_a_micro_batch_of_the_teacher_too():
    config = _config(ModelParallelConfig(context=4), data=4)
    config = replace(config, train=TrainConfig(steps=1, tokens_per_micro_batch=13))
    _check_micro_batch(replace(config, teacher=TeacherConfig()), 14)
    with pytest.raises(ConfigError, match="make 16 positions"):
        _check_micro_batch(config, 14)


def test_stages_of_the_teacher_on_those_of_the_student():
    run = _planned("teacher.parallel.tensor=2", "teacher.parallel.pipeline=4")
    assert [list(run.scoring_stages(stage)) for stage in (0, 1)] == [[0, 1], [2, 3]]
    assert list(_planned("teacher.parallel.tensor=8").scoring_stages(1)) == [0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.parallel.pipeline=32"], None),
        (["teacher.parallel.pipeline=16", "teacher.parallel.tensor=2"], None),
        (
            ["teacher.parallel.tensor=16"],
            "teacher.parallel.tensor = 16 must divide the teacher's k",
        ),
        (["teacher.parallel.expert=2"], "teacher.parallel.expert = 2 needs a mixture"),
    ],
)
def test_plans_refuse_what_the_trainer_refuses(overrides: list[str], words: str | None):
    if words is None:
        _planned(*overrides)
        return
    with pytest.raises(ConfigError, match=words):
        _planned(*overrides)


def test_rounds_are_planned_as_they_are():
    from megatron_tropd.mcore import exchange

    assert memory.ROUND_OF_STAGE == exchange.ROUND_OF_STAGE
