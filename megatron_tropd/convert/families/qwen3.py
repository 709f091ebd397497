"""Qwen3, dense: no biases, a norm on the heads of queries and keys."""

from megatron_tropd.convert.families._base import Family, window_by_layer

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    windows=window_by_layer,
    window_switch=True,
    ignores=("mlp_bias",),
)
