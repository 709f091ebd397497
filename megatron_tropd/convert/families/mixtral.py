"""Mixtral 8x7B and 8x22B: Llama's attention, a mixture of experts in every layer."""

from megatron_tropd.convert.families._base import (
    Family,
    Mixture,
    Requirement,
    window_everywhere,
)

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    windows=window_everywhere,
    mixture=Mixture(
        count="num_local_experts",
        ffn="intermediate_size",
        block="block_sparse_moe",
        gate_up_down=("w1", "w3", "w2"),
    ),
    ignores=("attention_bias", "mlp_bias"),
    requirements=(Requirement("router_jitter_noise", (0.0,), "Set it to 0 in config.json."),),
)
