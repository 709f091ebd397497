"""Adapters to other people's training loops; the only room that imports ``megatron.training``."""
