"""Llama 2 and 3.x (rotary scaling included), and models of their architecture."""

from megatron_tropd.convert.families._base import Family

FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM")
