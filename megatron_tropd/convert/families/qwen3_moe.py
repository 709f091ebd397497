"""Qwen3-MoE: Qwen3's attention, a mixture of experts in every layer."""

from megatron_tropd.convert.families._base import (
    Family,
    Mixture,
    Requirement,
    window_everywhere,
)

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qk_norm=True,
    windows=window_everywhere,
    window_switch=True,
    mixture=Mixture(
        count="num_experts",
        ffn="moe_intermediate_size",
        normalized="norm_topk_prob",  # true in the published models, transformers' default is not
        block="mlp",
        gate_up_down=("gate_proj", "up_proj", "down_proj"),
        written={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    ignores=("mlp_bias",),
    requirements=(
        Requirement("mlp_only_layers", ([],), "Every layer must have experts."),
        Requirement("decoder_sparse_step", (1,), "Every layer must have experts."),
        Requirement("shared_expert_intermediate_size", (0,)),
    ),
)
