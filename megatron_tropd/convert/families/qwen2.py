"""Qwen2 and Qwen2.5, and what was trained from them (R1-Distill-Qwen): biases in the attention."""

from megatron_tropd.convert.families._base import Entry, Family, ModelShape, window_by_layer
from megatron_tropd.convert.families._blocks import attention, gated_mlp, qkv_biases


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention with biases for query, key and value, and a gated MLP."""
    return [*attention(shape, hf), *qkv_biases(shape, hf), *gated_mlp(shape, hf)]


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=layer,
    qkv_bias=True,
    windows=window_by_layer,
    window_switch=True,
    ignores=("attention_bias", "mlp_bias"),
)
