"""Mistral 7B: Llama's layers; v0.1 with a sliding window, later ones without."""

from megatron_tropd.convert.families._base import (
    Entry,
    Family,
    ModelShape,
    Requirement,
    window_everywhere,
)
from megatron_tropd.convert.families._blocks import attention, gated_mlp


def layer(shape: ModelShape, hf: str) -> list[Entry]:
    """Attention and a gated MLP, no bias."""
    return [*attention(shape, hf), *gated_mlp(shape, hf)]


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=layer,
    windows=window_everywhere,
    requirements=(Requirement("ada_rms_norm_t_cond", (False,)),),
)
