"""Trust Region On-Policy Distillation (TrOPD) on Megatron-Core and vLLM."""

__version__ = "0.1.0"
