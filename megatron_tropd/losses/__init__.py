"""Distillation losses on a vocabulary that may be sharded; torch only, no Megatron.

Usable alone: :func:`tropd_loss` takes the logits of any training loop and a process group,
:func:`tropd_loss_from_hidden` hidden states and the output layer.

The names below are imported when they are asked for: the methods' settings are read without torch.
"""

import importlib
from typing import Any

_MODULES = {
    "align": ("align_logits", "align_output_weight"),
    "draws": ("Purpose", "keyed_seed", "keyed_uniform"),
    "method": ("BatchFacts", "Method", "SampledMethod", "TokenChoices"),
    "objective": ("token_statistics", "tropd_loss", "tropd_loss_from_hidden"),
    "reduction": ("reduce_signal", "top_k_signal"),
    "signals": (
        *("FullSignal", "HiddenStatesSignal", "LogitsSignal", "TeacherSignal", "TopKSignal"),
        *("ReferencedSignal", "ReferencedTopKSignal", "RoutedSignal"),
        *("check_signal", "required_signal"),
    ),
    "statistics": ("TokenStatistics",),
    "targets": ("LossOutput", "LossTargets", "SummedLoss", "unrounded_gradient"),
    "vocab_parallel": ("equal_bounds",),
}
_ROOM_OF = {name: module for module, names in _MODULES.items() for name in names}
_ROOM_OF |= dict.fromkeys(("PRESETS", "preset"), "")

__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> Any:
    """A public name, or a module of this room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_ROOM_OF[name]}" if _ROOM_OF[name] else "megatron_tropd.config.loss"
    return getattr(importlib.import_module(module), name)
