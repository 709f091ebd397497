"""Qwen2 and Qwen2.5, and what was trained from them (R1-Distill-Qwen): biases in the attention."""

from megatron_tropd.convert.families._base import Family, window_by_layer

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    windows=window_by_layer,
    window_switch=True,
    ignores=("attention_bias", "mlp_bias"),
)
