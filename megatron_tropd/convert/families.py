"""The dense model families: what a config.json means, and which HF tensor is which parameter.

The names on Megatron's side are those of its checkpoints (norms fused into the following linear
layer); where a model keeps its norms apart, ``megatron_tropd.mcore.weights`` translates.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tropd.convert.ops import (
    FusedQKV,
    GateUp,
    Operation,
    Replicated,
    Sharded,
    VocabularyRows,
)
from megatron_tropd.errors import InputError


@dataclass(frozen=True)
class Family:
    """What distinguishes a dense family from the others."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}
"""Supported values of config.json's ``model_type``."""

_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one model, with every default of its config.json filled in."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    rms_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its checkpoint name, its layer, and how to make it."""

    name: str
    operation: Operation
    layer: int | None = None
    """0-based layer; None outside the layers."""


def model_shape(hf_config: dict[str, Any]) -> ModelShape:
    """Read a config.json dictionary.

    Raises:
        InputError: the architecture, or a feature it uses, is not supported.
    """
    config = _transformers_config(hf_config)
    family = FAMILIES[config.model_type]
    _check_features(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rms_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def describe(hf_config: dict[str, Any]) -> str:
    """One line for a person: family, sizes, number of parameters."""
    shape = model_shape(hf_config)
    sizes = (
        prod(tensor) for entry in plan(hf_config) for tensor in entry.operation.hf_shapes().values()
    )
    return (
        f"{shape.family}, {sum(sizes):,} parameters, {shape.layers} layers, hidden {shape.hidden}, "
        f"heads {shape.heads}/{shape.kv_heads} x {shape.head_dim}, "
        f"{'tied' if shape.tied else 'untied'}, vocabulary {shape.vocab}"
    )


def rope_inverse_frequencies(hf_config: dict[str, Any]) -> torch.Tensor:
    """[head_dim / 2] float32 on the CPU: rotary frequencies, scaling included."""
    config = _transformers_config(hf_config)
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return frequencies.float()
    head_dim = model_shape(hf_config).head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / rope["rope_theta"] ** exponents


def plan(hf_config: dict[str, Any], padded_vocab: int | None = None) -> list[Entry]:
    """Every parameter of the model in the order of the layers; tied output layers left out.

    Args:
        hf_config: the config.json dictionary.
        padded_vocab: rows of the padded embedding; None: not padded.
    """
    shape = model_shape(hf_config)
    rows = shape.vocab if padded_vocab is None else padded_vocab
    vocabulary = (shape.vocab, shape.hidden)
    entries = [
        Entry(
            "embedding.word_embeddings.weight",
            VocabularyRows("model.embed_tokens.weight", vocabulary, rows),
        )
    ]
    for layer in range(shape.layers):
        entries += _layer(shape, layer)
    entries.append(
        Entry("decoder.final_layernorm.weight", Replicated("model.norm.weight", (shape.hidden,)))
    )
    if not shape.tied:
        output = VocabularyRows("lm_head.weight", vocabulary, rows)
        entries.append(Entry("output_layer.weight", output))
    return entries


def _layer(shape: ModelShape, layer: int) -> list[Entry]:
    hf, mcore = f"model.layers.{layer}", f"decoder.layers.{layer}"
    attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
    hidden, query_rows = shape.hidden, shape.heads * shape.head_dim

    def qkv(kind: str, columns: tuple[int, ...]) -> FusedQKV:
        query, key, value = (f"{attention}.{letter}_proj.{kind}" for letter in "qkv")
        return FusedQKV(query, key, value, shape.heads, shape.kv_heads, shape.head_dim, columns)

    operations: dict[str, Operation] = {
        "self_attention.linear_qkv.layer_norm_weight": Replicated(
            f"{hf}.input_layernorm.weight", (hidden,)
        ),
        "self_attention.linear_qkv.weight": qkv("weight", (hidden,)),
    }
    if shape.qkv_bias:
        operations["self_attention.linear_qkv.bias"] = qkv("bias", ())
    if shape.qk_norm:
        for letter in "qk":
            operations[f"self_attention.{letter}_layernorm.weight"] = Replicated(
                f"{attention}.{letter}_norm.weight", (shape.head_dim,)
            )
    operations |= {
        "self_attention.linear_proj.weight": Sharded(
            f"{attention}.o_proj.weight", (hidden, query_rows), dim=1
        ),
        "mlp.linear_fc1.layer_norm_weight": Replicated(
            f"{hf}.post_attention_layernorm.weight", (hidden,)
        ),
        "mlp.linear_fc1.weight": GateUp(
            f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", (shape.ffn, hidden)
        ),
        "mlp.linear_fc2.weight": Sharded(f"{mlp}.down_proj.weight", (hidden, shape.ffn), dim=1),
    }
    return [Entry(f"{mcore}.{name}", operation, layer) for name, operation in operations.items()]


def _transformers_config(hf_config: dict[str, Any]) -> PretrainedConfig:
    model_type = hf_config.get("model_type")
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    found = (hf_config.get("architectures") or [model_type])[0]
    if model_type not in FAMILIES or found not in (model_type, FAMILIES[model_type].architecture):
        raise InputError(
            f"Model architecture {found} (model_type {model_type!r}) is not supported. "
            f"Supported: {supported}."
        )
    return AutoConfig.for_model(**hf_config)


def _check_features(config: PretrainedConfig) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    rope_type = config.rope_parameters["rope_type"]
    unsupported = {
        f"hidden_act = {config.hidden_act!r} (supported: silu)": config.hidden_act != "silu",
        "attention_bias = true": getattr(config, "attention_bias", False),
        "mlp_bias = true": getattr(config, "mlp_bias", False),
        f"layer_types {sorted(layer_types)} (supported: full_attention)": layer_types
        != {"full_attention"},
        f"rope_type = {rope_type!r} (supported: {', '.join(_ROPE_TYPES)})": rope_type
        not in _ROPE_TYPES,
        "partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
        "quantization_config": getattr(config, "quantization_config", None) is not None,
    }
    for feature, used in unsupported.items():
        if used:
            raise InputError(f"This {config.model_type} model uses {feature}: not supported.")
