"""[teacher.parallel] as a setting: what fits, what is refused in which words, what is kept."""

import json
from dataclasses import replace

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
from megatron_tropd.convert.checks import check_parallel

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
    with pytest.raises(ConfigError, match=r"\[teacher.parallel\] lays out a model on the student"):
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
