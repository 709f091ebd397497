"""HF folders, the invertible operations and the family tables; no Megatron."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli.main import main
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.checks import check_parallel
from megatron_tropd.convert.families import (
    FAMILIES,
    describe,
    model_shape,
    plan,
    rope_inverse_frequencies,
)
from megatron_tropd.convert.families._ops import (
    FusedQKV,
    GateUp,
    Operation,
    Replicated,
    Sharded,
    VocabularyRows,
)
from megatron_tropd.convert.hf_folder import HFFolder

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 13,
}
OPERATIONS = (
    Replicated("a", (5,)),
    Sharded("a", (8, 3), dim=0),
    Sharded("a", (3, 8), dim=1),
    VocabularyRows("a", (13, 3), padded_rows=20),
    VocabularyRows("a", (5, 3), padded_rows=64),
    GateUp("a", "b", (8, 3)),
    FusedQKV("a", "b", "c", heads=8, kv_heads=4, head_dim=3, columns=(5,)),
    FusedQKV("a", "b", "c", heads=8, kv_heads=4, head_dim=3, columns=()),
    FusedQKV("a", "b", "c", heads=4, kv_heads=4, head_dim=2, columns=(5,)),
)


def write_folder(folder: Path, operation: Operation) -> HFFolder:
    """A folder holding random tensors of an operation."""
    folder.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in operation.hf_shapes().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{}")
    return HFFolder(folder)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)
def test_operations_invert(operation: Operation, tp_size: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", operation)
    shards = [operation.read(folder, rank, tp_size) for rank in range(tp_size)]
    assert {tuple(shard.shape) for shard in shards} == {operation.shard_shape(tp_size)}
    merged = operation.merge(shards)
    assert merged.keys() == operation.hf_shapes().keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, folder.read(name))


def test_fused_qkv_groups_query_heads_with_their_key_and_value(tmp_path: Path) -> None:
    operation = FusedQKV("q", "k", "v", heads=4, kv_heads=2, head_dim=1, columns=())
    save = {"q": torch.tensor([0.0, 1, 2, 3]), "k": torch.tensor([10.0, 11])}
    save["v"] = torch.tensor([20.0, 21])
    save_file(save, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    folder = HFFolder(tmp_path)
    assert operation.read(folder, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert operation.read(folder, 1, 2).tolist() == [2, 3, 11, 21]


def test_a_rank_reads_only_its_part() -> None:
    """Over all ranks each row is read once, whatever the operation."""

    class Counting:
        def __init__(self) -> None:
            self.elements = 0

        def read(self, name, *, dim=0, start=0, stop=None):
            full = torch.zeros(shapes[name])
            stop = full.shape[dim] if stop is None else stop
            part = full.narrow(dim, start, stop - start)
            self.elements += part.numel()
            return part

    for operation in OPERATIONS[1:]:
        shapes = operation.hf_shapes()
        source = Counting()
        for rank in range(4):
            operation.read(source, rank, 4)
        assert source.elements == sum(torch.zeros(s).numel() for s in shapes.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_plan_accounts_for_every_tensor(
    family: str, tied: bool, tiny_model: Callable[..., Path]
) -> None:
    folder = HFFolder(tiny_model(family, tie_word_embeddings=tied))
    expected: dict[str, tuple[int, ...]] = {}
    for entry in plan(folder.config):
        for name, shape in entry.operation.hf_shapes().items():
            assert name not in expected
            expected[name] = shape
    assert expected == {name: folder.shape(name) for name in folder.names}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_makes_its_tensors_again(
    family: str, tp_size: int, tiny_model: Callable[..., Path]
) -> None:
    folder = HFFolder(tiny_model(family))
    for entry in plan(folder.config, padded_vocab=320):
        shards = [entry.operation.read(folder, rank, tp_size) for rank in range(tp_size)]
        assert {tuple(shard.shape) for shard in shards} == {entry.operation.shard_shape(tp_size)}
        for name, tensor in entry.operation.merge(shards).items():
            assert torch.equal(tensor, folder.read(name)), name


def test_plan_matches_the_index_of_a_published_model(shared_data: Path) -> None:
    folder = shared_data / "hf-meta" / "Qwen3-1.7B"
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    entries = plan(config)
    names = {name for entry in entries for name in entry.operation.hf_shapes()}
    # The published files also hold the tied output layer.
    assert set(index["weight_map"]) - names <= {"lm_head.weight"}
    assert names <= set(index["weight_map"])
    assert model_shape(config).head_dim == 128


def test_models_do_not_share_state() -> None:
    """A tied model planned first must not change the plan of an untied one."""
    untied = [e.name for e in plan(LLAMA | {"tie_word_embeddings": False})]
    plan(LLAMA | {"tie_word_embeddings": True})
    assert [e.name for e in plan(LLAMA | {"tie_word_embeddings": False})] == untied
    assert "output_layer.weight" in untied


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    assert torch.equal(rope_inverse_frequencies(old), rope_inverse_frequencies(new))
    plain = rope_inverse_frequencies(LLAMA | {"rope_theta": 5e5})
    assert not torch.equal(rope_inverse_frequencies(old), plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*bfloat16"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_unsupported_models_are_named(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        model_shape(LLAMA | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "24"}, "hidden_size"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"rope_scaling": "linear"}, "rope_parameters"),
        ({"rope_theta": None}, "positive rope_theta, found None"),
        ({"num_attention_heads": 0}, "no llama config"),
        ({"vocab_size": -1}, "vocab_size of at least 1, found -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of at least 1"),
        ({"num_key_value_heads": 3}, "8 attention heads for 3 key/value heads"),
        ({"model_type": ["llama"]}, "not supported"),
    ],
)
def test_configs_that_mean_nothing_are_refused(change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        model_shape(LLAMA | change)


MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
}
ARCHITECTURES = {
    name: {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    | MIXTURES.get(name, {})
    for name in FAMILIES
}


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "full_attention"),
        ("mixtral", {"num_experts_per_tok": 1}, "expected 2 to 8"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\], expected \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "expected 2 to 8"),
    ],
)
def test_unsupported_features_of_a_family_are_named(family: str, change: dict, named: str) -> None:
    config = LLAMA | ARCHITECTURES[family]
    model_shape(config)
    with pytest.raises(InputError, match=named):
        model_shape(config | change)


UPPER = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
"""Qwen's way to have windows in some layers only."""


@pytest.mark.parametrize(
    ("family", "change", "windows"),
    [
        ("llama", {"sliding_window": 4096}, (None, None)),
        ("llama", {"sliding_window": 32, "use_sliding_window": False}, (None, None)),
        ("mistral", {"sliding_window": 32}, (32, 32)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("mixtral", {"sliding_window": 32}, (32, 32)),
        ("qwen2", {"sliding_window": 32}, (None, None)),
        ("qwen2", UPPER, (None, 32)),
        ("qwen3", UPPER, (None, 32)),
        ("qwen3_moe", {"sliding_window": 32, "use_sliding_window": True}, (32, 32)),
    ],
)
def test_windows_are_those_of_transformers(family: str, change: dict, windows: tuple) -> None:
    config = LLAMA | ARCHITECTURES[family] | change
    assert model_shape(config).windows == windows


def test_experts_have_one_entry_each_under_the_name_megatron_stacks_them() -> None:
    config = LLAMA | ARCHITECTURES["qwen3_moe"]
    found = [e for e in plan(config) if e.layer == 1 and e.expert is not None]
    assert [e.expert for e in found] == [n for n in range(8) for _ in "12"]
    assert {e.name for e in found} == {
        f"decoder.layers.1.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2)
    }
    assert list(found[2].operation.hf_shapes()) == [
        "model.layers.1.mlp.experts.1.gate_proj.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight",
    ]
    assert "2 of 8 experts" in describe(config)


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        (ParallelConfig(data=3, expert=3), "experts, found 8"),
        (ParallelConfig(tensor=2), "sequence_parallel"),
        (ParallelConfig(tensor=4, sequence_parallel=True), None),
    ],
)
def test_layouts_of_mixtures_are_checked(parallel: ParallelConfig, named: str | None) -> None:
    config = LLAMA | ARCHITECTURES["qwen3_moe"]
    with pytest.raises(ConfigError, match=named) if named else nullcontext():
        check_parallel(config, parallel, who="student")


def test_unreadable_folders_say_what_is_wrong(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        HFFolder(tmp_path / "absent")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"truncated"):
        HFFolder(broken)
    weights.unlink()
    with pytest.raises(InputError, match="neither"):
        HFFolder(broken)
    weights.write_bytes(whole)
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        HFFolder(broken)
    (broken / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        HFFolder(broken)


def test_an_index_must_be_true(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    names = sorted(HFFolder(folder).names)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert HFFolder(folder).names == set(names)
    index.write_text(json.dumps({"weight_map": {"model.absent": "model.safetensors"}}))
    with pytest.raises(InputError, match=r"model\.absent"):
        HFFolder(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "other.safetensors"}}))
    with pytest.raises(InputError, match=r"holds two models: model\.safetensors.*other\."):
        HFFolder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"other\.safetensors is missing"):
        HFFolder(folder)


def test_drop_layers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = HFFolder(tiny_model("qwen3", num_hidden_layers=3))
    arguments = ["drop-layers", "--model", str(source.path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--drop", "1"]) == 0
    pruned = HFFolder(tmp_path / "out")
    assert pruned.config["num_hidden_layers"] == 2
    assert pruned.config["layer_types"] == ["full_attention"] * 2
    expected = {n for entry in plan(pruned.config) for n in entry.operation.hf_shapes()}
    assert pruned.names == expected
    name = "self_attn.q_proj.weight"
    moved = pruned.read(f"model.layers.1.{name}")
    assert torch.equal(moved, source.read(f"model.layers.2.{name}"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert main([*arguments, "--drop", "1"]) == 2  # the folder exists now
    arguments[-1] = str(tmp_path / "other")
    assert main([*arguments, "--drop", "3"]) == 2
    assert main([*arguments, "--drop", "0,1,2"]) == 2
    assert not (tmp_path / "other").exists()
