"""The model families: what a config.json means, and which HF tensor is which parameter.

One file per family, which defines ``FAMILY``; every file of this folder is one, but for those
whose name starts with an underscore. docs/model_families.md shows how to add one.
"""

from dataclasses import replace
from functools import partial
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.families._base import (
    Entry,
    Experts,
    Family,
    ModelShape,
    Requirement,
)
from megatron_tropd.convert.families._blocks import standard_layer
from megatron_tropd.convert.families._keys import (
    check_keys,
    check_numbers,
    check_windows,
    new_fields,
    requirements_of,
    written_config,
)
from megatron_tropd.convert.families._ops import (
    FusedQKV,
    GateUp,
    Operation,
    Replicated,
    Sharded,
    Source,
    VocabularyRows,
)

__all__ = [
    "FAMILIES",
    "Entry",
    "Experts",
    "Family",
    "FusedQKV",
    "GateUp",
    "ModelShape",
    "Operation",
    "Replicated",
    "Requirement",
    "Sharded",
    "Source",
    "describe",
    "engine_config",
    "model_shape",
    "new_fields",
    "plan",
    "rope_inverse_frequencies",
    "rope_parameters",
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
    for requirement in requirements_of(family):
        requirement.check(config)
    check_keys(hf_config, family)
    check_numbers(hf_config, config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        context=_context(config),
        rms_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        windows=family.windows(config),
        experts=_experts(family, config),
    )
    check_windows(hf_config, family, shape)
    return shape


def engine_config(hf_config: dict[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """The config.json of the same model with the keys that were read and no others.

    Args:
        vocab_size: columns of the embeddings; None: the model's.

    Raises:
        InputError: as :func:`model_shape`.
    """
    shape = model_shape(hf_config)
    family = FAMILIES[shape.family]
    return written_config(_transformers_config(hf_config), family, shape, vocab_size or shape.vocab)


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


def rope_parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    """``rope_type``, ``rope_theta``, numbers of the scaling; the family's defaults filled in."""
    return dict(_transformers_config(hf_config).rope_parameters)


def plan(hf_config: dict[str, Any], padded_vocab: int | None = None) -> list[Entry]:
    """Every parameter of the model in the order of the layers; tied output layers left out.

    Args:
        padded_vocab: rows of the padded embedding; None: not padded.
    """
    shape = model_shape(hf_config)
    rows = shape.vocab if padded_vocab is None else padded_vocab
    vocabulary = (shape.vocab, shape.hidden)
    embedding = VocabularyRows("model.embed_tokens.weight", vocabulary, rows)
    entries = [Entry("embedding.word_embeddings.weight", embedding)]
    family = FAMILIES[shape.family]
    layer = family.layer or partial(standard_layer, names=family.mixture)
    for n in range(shape.layers):
        entries += [
            replace(entry, name=f"decoder.layers.{n}.{entry.name}", layer=n)
            for entry in layer(shape, f"model.layers.{n}")
        ]
    norm = Replicated("model.norm.weight", (shape.hidden,))
    entries.append(Entry("decoder.final_layernorm.weight", norm))
    if not shape.tied:
        output = VocabularyRows("lm_head.weight", vocabulary, rows)
        entries.append(Entry("output_layer.weight", output))
    return entries


def _context(config: PretrainedConfig) -> int:
    """Positions the rotary embedding reaches. Linear scaling stretches those of the config; the
    other kinds come with ``max_position_embeddings`` of the stretched model, as vLLM reads it.
    """
    rope = config.rope_parameters
    factor = rope["factor"] if rope["rope_type"] == "linear" else 1
    return int(config.max_position_embeddings * factor)


def _experts(family: Family, config: PretrainedConfig) -> Experts | None:
    if family.mixture is None:
        return None
    experts = family.mixture.read(config)
    for what, size in (("number", experts.count), ("intermediate size", experts.ffn)):
        # Under their other names (num_local_experts) transformers checks no type.
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(
                f"config.json must have a whole {what} of experts of at least 1, found {size!r}."
            )
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
    architectures = hf_config.get("architectures") or [model_type]
    found = architectures[0] if isinstance(architectures, list) else architectures
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or found not in (model_type, family.architecture):
        raise InputError(
            f"Model architecture {found} (model_type {model_type!r}) is not supported. "
            f"Supported: {supported}."
        )
    try:
        return AutoConfig.for_model(**hf_config)
    except (
        StrictDataclassError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"config.json is no {model_type} config that transformers {transformers.__version__} "
            f"reads: {reason}"
        ) from None
