"""config.json: every key is carried, known to change nothing, or refused by name."""

import json
from pathlib import Path

import pytest

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.families import FAMILIES, engine_config, model_shape, new_fields

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OWN = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def config_of(family: str, **change: object) -> dict:
    names = {"model_type": family, "architectures": [FAMILIES[family].architecture]}
    return LLAMA | names | OWN.get(family, {}) | change


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_transformers_config_is_accounted_for(family: str) -> None:
    """A field that a newer transformers adds is looked at before it is let through."""
    assert new_fields(FAMILIES[family]) == set()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_the_engine_s_config_means_the_same_model(family: str, change: dict) -> None:
    config = config_of(family, torch_dtype="bfloat16", auto_map={"a": "b"}, eos_token_id=2)
    config |= change
    written = engine_config(config)
    assert model_shape(written) == model_shape(config)
    assert written.keys().isdisjoint({"torch_dtype", "auto_map", "eos_token_id"})
    assert engine_config(written) == written
    json.dumps(written)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 16}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"sliding_window": 16, "max_window_layers": 1}),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}),
        ("qwen3_moe", {"sliding_window": None, "max_window_layers": 48}),
    ],
)
def test_the_engine_s_config_has_the_windows_that_were_read(family: str, change: dict) -> None:
    config = config_of(family, **change)
    windows = model_shape(config).windows
    written = engine_config(config)
    assert model_shape(written).windows == windows
    # Where no layer has a window, vLLM must find none: it takes what it finds for all layers.
    assert written.get("sliding_window") == windows[0]


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "x", "transformers_version": "4.1", "use_cache": True},
        {"unsloth_fixed": True, "pretraining_tp": 2, "attention_dropout": 0.1},
        {"sliding_window": None, "is_causal": True, "logit_scale": 1.0, "new_key": None},
        {"use_mrope": False, "use_qk_norm": False, "pruned_heads": {}, "temperature": 0.6},
        {"sliding_window": 128},
        # Found in published configs: SmolLM2, Falcon3.
        {"is_llama_config": True, "rope_interleaved": False, "activation": "swiglu"},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 1.0}},
    ],
)
def test_keys_that_change_nothing_pass(change: dict) -> None:
    assert model_shape(config_of("llama", **change)) == model_shape(config_of("llama"))


def test_a_published_mixture_says_its_norms_and_biases() -> None:
    """As Qwen3-Coder-30B-A3B does."""
    said = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    model_shape(config_of("qwen3_moe", **said))
    with pytest.raises(InputError, match="use_qk_norm = False, expected True"):
        model_shape(config_of("qwen3_moe", use_qk_norm=False))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"sliding_window": 8}, "sliding_window = 8.*attends to everything"),
        ("llama", {"sliding_window": 8, "use_sliding_window": True}, "attends to everything"),
        ("llama", {"is_causal": False}, "is_causal = False, expected True"),
        ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5"),
        ("llama", {"bias": True}, "bias = True"),
        ("llama", {"qkv_bias": True}, "qkv_bias = True"),
        ("llama", {"head_dtype": "float32"}, "head_dtype"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size = 8"),
        ("llama", {"num_experts": 4}, "num_experts = 4"),
        ("llama", {"final_logit_softcapping": 30.0, "x": 1}, "softcapping = 30.0, x = 1"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention"),
        ("qwen2", {"qk_norm": True}, "qk_norm = True"),
        ("qwen2", {"is_causal": False}, "is_causal"),
        ("qwen3", {"qk_norm": False}, "qk_norm = False"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window"),
        ("mistral", {"sliding_window": 0}, "at least 1 or null, found 0"),
        ("mistral", {"sliding_window": -1}, "at least 1 or null, found -1"),
        (
            "qwen3_moe",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            "max_window_layers = 1",
        ),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "but no window"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts = 4 and num_local_experts = 8"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings"),
        ("llama", {"head_dim": 0}, "head_dim"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.0}}, "positive factor"),
        ("llama", {"rope_scaling": {"type": "default", "factor": 4.0}}, "factor = 4.0"),
        ("llama", {"rope_scaling": LLAMA3 | {"mrope_section": [1, 2]}}, "mrope_section"),
        (
            "llama",
            {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta = 500000.0 and 10000.0",
        ),
        ("llama", {"activation": "geglu"}, "activation = 'geglu'"),
        ("llama", {"rope_theta": float("inf")}, "positive rope_theta, found inf"),
        ("llama", {"rope_theta": float("nan")}, "positive rope_theta, found nan"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": float("inf")}}, "positive factor"),
        # transformers scales other frequencies than vLLM where these are the wrong way round.
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, "less than high_freq"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "less than high_freq"),
        (
            "llama",
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling.rope_type = 'llama3' and rope_parameters.rope_type = 'default'",
        ),
        ("llama", {"rope_scaling": LLAMA3 | {"type": "linear"}}, "'llama3' and rope_scaling.type"),
    ],
)
def test_keys_that_make_two_models_are_refused(family: str, change: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        model_shape(config_of(family, **change))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("qwen2", "attention_bias"), ("qwen2", "mlp_bias"), ("qwen3", "mlp_bias")),
        *(("mixtral", "attention_bias"), ("qwen3_moe", "mlp_bias")),
    ],
)
def test_keys_that_nobody_reads_for_a_family_pass(family: str, key: str) -> None:
    model_shape(config_of(family, **{key: True}))


def test_real_configs_pass(shared_data: Path) -> None:
    for path in sorted(
        [*shared_data.glob("models/*/config.json"), *shared_data.glob("hf-meta/*/config.json")]
    ):
        config = json.loads(path.read_text())
        assert model_shape(engine_config(config)) == model_shape(config), path
