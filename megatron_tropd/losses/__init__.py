"""Distillation losses on logits that may be sharded over the vocabulary; torch only, no Megatron.

Usable alone: :func:`tropd_loss` takes the logits of any training loop and a process group.
"""

from megatron_tropd.losses.draws import Purpose, keyed_seed, keyed_uniform
from megatron_tropd.losses.objective import LossOutput, LossTargets, tropd_loss
from megatron_tropd.losses.signals import (
    FullSignal,
    HiddenStatesSignal,
    LogitsSignal,
    TeacherSignal,
    TopKSignal,
    check_signal,
    required_signal,
    top_k_signal,
)
from megatron_tropd.losses.statistics import TokenStatistics, token_statistics

__all__ = [
    "FullSignal",
    "HiddenStatesSignal",
    "LogitsSignal",
    "LossOutput",
    "LossTargets",
    "Purpose",
    "TeacherSignal",
    "TokenStatistics",
    "TopKSignal",
    "check_signal",
    "keyed_seed",
    "keyed_uniform",
    "required_signal",
    "token_statistics",
    "top_k_signal",
    "tropd_loss",
]
