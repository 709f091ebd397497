"""Llama 2 and 3.x (rotary scaling included), and models of their architecture."""

from megatron_tropd.convert.families._base import Entry, Family, ModelShape
from megatron_tropd.convert.families._blocks import attention, gated_mlp


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention and a gated MLP, no bias."""
    return [*attention(shape, hf), *gated_mlp(shape, hf)]


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=layer,
)
