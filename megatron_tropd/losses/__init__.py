"""Distillation losses on a vocabulary that may be sharded; torch only, no Megatron.

Usable alone: :func:`tropd_loss` takes the logits of any training loop and a process group,
:func:`tropd_loss_from_hidden` hidden states and the output layer.
"""

from megatron_tropd.config.loss import PRESETS, LossConfig, preset
from megatron_tropd.losses.align import align_logits, align_output_weight
from megatron_tropd.losses.draws import (
    Purpose,
    keyed_seed,
    keyed_uniform,
    keyed_uniform_rows,
)
from megatron_tropd.losses.objective import (
    token_statistics,
    token_statistics_from_hidden,
    tropd_loss,
    tropd_loss_from_hidden,
)
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
from megatron_tropd.losses.statistics import TokenStatistics
from megatron_tropd.losses.targets import (
    LossOutput,
    LossTargets,
    SummedLoss,
    unrounded_gradient,
)
from megatron_tropd.losses.vocab_parallel import equal_bounds

__all__ = [
    "PRESETS",
    "FullSignal",
    "HiddenStatesSignal",
    "LogitsSignal",
    "LossConfig",
    "LossOutput",
    "LossTargets",
    "Purpose",
    "SummedLoss",
    "TeacherSignal",
    "TokenStatistics",
    "TopKSignal",
    "align_logits",
    "align_output_weight",
    "check_signal",
    "equal_bounds",
    "keyed_seed",
    "keyed_uniform",
    "keyed_uniform_rows",
    "preset",
    "required_signal",
    "token_statistics",
    "token_statistics_from_hidden",
    "top_k_signal",
    "tropd_loss",
    "tropd_loss_from_hidden",
    "unrounded_gradient",
]
