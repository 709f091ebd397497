"""Qwen3-MoE: Qwen3's attention, a mixture of experts in every layer."""

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


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=layer,
    qk_norm=True,
    windows=window_everywhere,
    experts=experts,
    ignores=("mlp_bias",),
    requirements=(
        Requirement("mlp_only_layers", ([],), "Every layer must have experts."),
        Requirement("decoder_sparse_step", (1,), "Every layer must have experts."),
        Requirement("shared_expert_intermediate_size", (0,)),
    ),
)
