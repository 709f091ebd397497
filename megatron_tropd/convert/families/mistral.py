"""Mistral 7B: Llama's layers; v0.1 with a sliding window, later ones without."""

from megatron_tropd.convert.families._base import Family, Requirement, window_everywhere

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    windows=window_everywhere,
    requirements=(Requirement("ada_rms_norm_t_cond", (False,)),),
)
