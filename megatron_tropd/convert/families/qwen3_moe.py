"""Qwen3-MoE: Qwen3's attention, a mixture of experts in every layer."""

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
from megatron_tropd.convert.families._blocks import attention, mixture, qk_norms


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention with normed queries and keys, and a mixture of experts."""
    names = {"block": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return [*attention(shape, hf), *qk_norms(shape, hf), *mixture(shape, hf, **names)]


def experts(config: PretrainedConfig) -> Experts:
    """``norm_topk_prob`` is true in the published models and false by transformers' default."""
    return Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        ffn=config.moe_intermediate_size,
        normalized=config.norm_topk_prob,
    )


def written_experts(shape: ModelShape) -> dict[str, Any]:
    """The keys that :func:`experts` reads; every layer has experts."""
    assert shape.experts is not None
    return {
        "num_experts": shape.experts.count,
        "num_experts_per_tok": shape.experts.per_token,
        "moe_intermediate_size": shape.experts.ffn,
        "norm_topk_prob": shape.experts.normalized,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=layer,
    qk_norm=True,
    windows=window_everywhere,
    window_switch=True,
    experts=experts,
    written_experts=written_experts,
    keys=frozenset(
        [
            *("num_experts", "num_local_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "norm_topk_prob"),
        ]
    ),
    ignores=("mlp_bias",),
    requirements=(
        Requirement("mlp_only_layers", ([],), "Every layer must have experts."),
        Requirement("decoder_sparse_step", (1,), "Every layer must have experts."),
        Requirement("shared_expert_intermediate_size", (0,)),
    ),
)
