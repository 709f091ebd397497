"""The model families: what a config.json means, and which HF tensor is which parameter.

One file per family, which defines ``FAMILY``; every file of this folder is one, but for those
whose name starts with an underscore. docs/extending.md shows how to add one.
"""

from dataclasses import replace
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tropd.convert.families._base import (
    COMMON_REQUIREMENTS,
    Entry,
    Experts,
    Family,
    ModelShape,
    Requirement,
)
from megatron_tropd.convert.ops import Replicated, VocabularyRows
from megatron_tropd.errors import InputError

__all__ = [
    "FAMILIES",
    "Entry",
    "Experts",
    "Family",
    "ModelShape",
    "Requirement",
    "describe",
    "model_shape",
    "plan",
    "rope_inverse_frequencies",
]


def _families() -> dict[str, Family]:
    names = [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]
    families = [import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in families}


FAMILIES = _families()
"""By config.json's ``model_type``."""


def model_shape(hf_config: dict[str, Any]) -> ModelShape:
    """Read a config.json dictionary.

    Raises:
        InputError: the architecture, or a feature it uses, is not supported.
    """
    config = _transformers_config(hf_config)
    family = FAMILIES[config.model_type]
    for requirement in (*COMMON_REQUIREMENTS, *family.requirements):
        requirement.check(config)
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
        windows=family.windows(config),
        experts=_experts(family, config),
    )


def describe(hf_config: dict[str, Any]) -> str:
    """One line for a person: family, sizes, number of parameters."""
    shape = model_shape(hf_config)
    sizes = (
        prod(tensor) for entry in plan(hf_config) for tensor in entry.operation.hf_shapes().values()
    )
    experts = shape.experts
    mixture = f"{experts.per_token} of {experts.count} experts, " if experts else ""
    return (
        f"{shape.family}, {sum(sizes):,} parameters, {shape.layers} layers, hidden {shape.hidden}, "
        f"heads {shape.heads}/{shape.kv_heads} x {shape.head_dim}, {mixture}"
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
    embedding = VocabularyRows("model.embed_tokens.weight", vocabulary, rows)
    entries = [Entry("embedding.word_embeddings.weight", embedding)]
    for n in range(shape.layers):
        entries += [
            replace(entry, name=f"decoder.layers.{n}.{entry.name}", layer=n)
            for entry in FAMILIES[shape.family].layer(shape, f"model.layers.{n}")
        ]
    norm = Replicated("model.norm.weight", (shape.hidden,))
    entries.append(Entry("decoder.final_layernorm.weight", norm))
    if not shape.tied:
        output = VocabularyRows("lm_head.weight", vocabulary, rows)
        entries.append(Entry("output_layer.weight", output))
    return entries


def _experts(family: Family, config: PretrainedConfig) -> Experts | None:
    if family.experts is None:
        return None
    experts = family.experts(config)
    fewest = 2 if experts.normalized else 1
    if not fewest <= experts.per_token <= experts.count:
        raise InputError(
            f"This {config.model_type} model has num_experts_per_tok = {experts.per_token}, "
            f"expected {fewest} to {experts.count} (a weight that is normalised alone is always 1 "
            "and gives the router no gradient). Choose another model."
        )
    return experts


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
