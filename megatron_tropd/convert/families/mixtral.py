"""Mixtral 8x7B and 8x22B: Llama's attention, a mixture of experts in every layer."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tropd.convert.families._base import (
    Entry,
    Experts,
    Family,
    ModelShape,
    Requirement,
    window_everywhere,
)
from megatron_tropd.convert.families._blocks import attention, mixture


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention and a mixture of experts, under the names of the published files."""
    names = {"block": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"}
    return [*attention(shape, hf), *mixture(shape, hf, **names)]


def experts(config: PretrainedConfig) -> Experts:
    """The weights of the chosen experts always sum to 1."""
    return Experts(
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        ffn=config.intermediate_size,
        normalized=True,
    )


def written_experts(shape: ModelShape) -> dict[str, Any]:
    """The keys that :func:`experts` reads."""
    assert shape.experts is not None
    return {
        "num_local_experts": shape.experts.count,
        "num_experts_per_tok": shape.experts.per_token,
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layer=layer,
    windows=window_everywhere,
    experts=experts,
    written_experts=written_experts,
    keys=frozenset({"num_experts", "num_local_experts", "num_experts_per_tok"}),
    ignores=("attention_bias", "mlp_bias"),
    requirements=(Requirement("router_jitter_noise", (0.0,), "Set it to 0 in config.json."),),
)
