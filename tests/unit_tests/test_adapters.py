"""Adapters without a model: what a user may ask for, which matrices there are, what PEFT reads."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import (
    Config,
    LoraConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from megatron_tropd.config.run_folder import open_run
from megatron_tropd.convert.adapters import FirstAdapters, adapter_plan, check_lora, peft_config
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import read_config
from megatron_tropd.planning.hardware import GPUS
from megatron_tropd.planning.memory import checkpoint_bytes, memory_of_stage
from megatron_tropd.planning.plan import make_plan
from megatron_tropd.planning.planned_run import plan_run
from megatron_tropd.planning.report import plan_json, plan_table

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "recipes"
H100 = GPUS["h100"]


def _config(*overrides: str, recipe: str = "qwen3_8b_one_node") -> Config:
    return load_config(RECIPES / f"{recipe}.toml", list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora.rank=0", r"model.lora.rank must be at least 1, found 0"),
        ("model.lora.alpha=0", r"model.lora.alpha must be above 0"),
        ("model.lora.dropout=1.0", r"model.lora.dropout must be in \[0, 1\)"),
        ('model.lora.targets=["q_proj"]', r"model.lora.targets must be one of \['linear_qkv'"),
        ('model.lora.targets=["linear_fc"]', r"found 'linear_fc'. Did you mean 'linear_fc"),
        ("model.lora.targets=[]", r"must name at least one layer"),
        ('model.lora.targets=["linear_qkv", "linear_qkv"]', r"each once, found \['linear_qkv'"),
        ("model.lora.r=8", r"Unknown config key model.lora.r\. .*Known here: rank"),
        ("model.lora=8", r"\[model.lora\] must be a table, found 8"),
    ],
)
def test_mistakes_are_named(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        _config(override)


def test_the_table_survives_toml_and_json(tmp_path):
    config = _config('model.lora.targets=["linear_fc2", "linear_qkv"]', "model.lora.rank=4")
    assert config.model.lora == LoraConfig(rank=4, targets=("linear_fc2", "linear_qkv"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    path = tmp_path / "written.toml"
    path.write_text(
        config_to_toml(dataclasses.replace(config, run=dataclasses.replace(config.run, dir="/x")))
    )
    assert load_config(path).model == config.model


def test_a_run_resumes_with_the_adapters_it_has(tmp_path):
    dir_ = f"run.dir={tmp_path / 'run'}"
    open_run(_config(dir_, "model.lora.rank=8"))
    open_run(_config(dir_, "model.lora.rank=8", "parallel.data=4"))
    with pytest.raises(ConfigError, match=r"model.lora: was .*'rank': 8.*, now .*'rank': 16"):
        open_run(_config(dir_, "model.lora.rank=16"))
    with pytest.raises(ConfigError, match=r"model.lora: was .*'rank': 8.*, now None"):
        open_run(_config(dir_))


def test_a_rank_above_the_layer_and_grouped_experts_are_refused():
    with pytest.raises(ConfigError, match=r"rank must be at most 4096, .*linear_qkv, found 5000"):
        plan_run(_config("model.lora.rank=5000"), H100)
    mixture = ("model.lora.rank=8", "parallel.pipeline=1")
    config = _config(*mixture, recipe="qwen3_30b_a3b")
    shape = model_shape(read_config(Path(config.model.student)))
    assert shape.experts is not None
    with pytest.raises(ConfigError, match=r"linear_fc1 and linear_fc2 .*moe_grouped_gemm = false"):
        check_lora(shape, LoraConfig(), grouped_experts=True)
    check_lora(shape, LoraConfig(), grouped_experts=False)
    check_lora(shape, LoraConfig(targets=("linear_qkv",)), grouped_experts=True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_shards_of_the_matrices_are_put_together_as_they_were_cut(family, tiny_model):
    """A merged with B of every part is W's part: cut by 1, 2, both ways."""
    config = read_config(tiny_model(family))
    entries = adapter_plan(config, LoraConfig(rank=4))
    first = FirstAdapters(entries, seed=1)
    names = set()
    for entry in entries:
        whole = entry.operation.merge([entry.operation.read(first, 0, 1)])
        parts = [entry.operation.read(first, rank, 2) for rank in range(2)]
        assert all(part.shape == entry.operation.shard_shape(2) for part in parts)
        halves = entry.operation.merge(parts)
        assert whole.keys() == halves.keys() == entry.operation.hf_shapes().keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, halves[name])
            assert tensor.shape == entry.operation.hf_shapes()[name]
            assert name.endswith("lora_B.weight") == bool((tensor == 0).all())
        names |= whole.keys()
    assert {name.replace("lora_A", "lora_B") for name in names if "lora_A" in name} == {
        name for name in names if "lora_B" in name
    }


def test_the_first_adapters_are_keyed_and_as_wide_as_torchs(tiny_model):
    entries = adapter_plan(read_config(tiny_model("llama")), LoraConfig(rank=4))
    one, again, other = (FirstAdapters(entries, seed) for seed in (1, 1, 2))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(one.read(name), again.read(name))
    assert not torch.equal(one.read(name), other.read(name))
    assert not torch.equal(one.read(name), one.read(name.replace("layers.1", "layers.0")))
    assert one.read(name).abs().max() <= 64**-0.5 < 1.1 * one.read(name).abs().max()


def test_peft_is_told_the_parts_of_fused_layers(tiny_model):
    config = read_config(tiny_model("llama"))
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.1, targets=("linear_qkv", "linear_fc2"))
    written = peft_config(config, lora, "base")
    assert written["target_modules"] == ["down_proj", "k_proj", "q_proj", "v_proj"]
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 6.0, 0.1)
    mixture = peft_config(read_config(tiny_model("mixtral")), LoraConfig(dropout=0.1), "base")
    assert {"w1", "w2", "w3", "o_proj"} <= set(mixture["target_modules"])
    assert mixture["lora_dropout"] == 0.0


def test_the_plan_counts_states_for_adapters_alone():
    full, config = plan_run(_config(), H100), _config("model.lora.rank=16")
    lora = plan_run(config, H100)
    # A 16 x (in + out) a layer: fused qkv, output, fused gate and up, down.
    sides = (4096 + 6144) + (4096 + 4096) + (4096 + 2 * 12288) + (12288 + 4096)
    assert lora.trained == 36 * 16 * sides
    before, after = memory_of_stage(full, 0), memory_of_stage(lora, 0)
    assert after.gradients < 0.01 * before.gradients
    assert after.optimizer < 0.01 * before.optimizer
    assert before.weights < after.weights < 1.01 * before.weights
    assert memory_of_stage(lora, 1).loss < memory_of_stage(full, 1).loss
    assert checkpoint_bytes(lora) == 14 * lora.trained
    plan = make_plan(config, H100)
    assert f"{lora.trained:,} parameters are trained" in " ".join(plan_table(plan).split())
    assert plan_json(plan)["trained_parameters"] == lora.trained
