"""Qwen3, dense: no biases, a norm on the heads of queries and keys."""

from megatron_tropd.convert.families._base import Entry, Family, ModelShape, window_by_layer
from megatron_tropd.convert.families._blocks import attention, gated_mlp, qk_norms


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention with normed queries and keys, and a gated MLP."""
    return [*attention(shape, hf), *qk_norms(shape, hf), *gated_mlp(shape, hf)]


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=layer,
    qk_norm=True,
    windows=window_by_layer,
    window_switch=True,
    ignores=("mlp_bias",),
)
