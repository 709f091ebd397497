"""Trust Region On-Policy Distillation (TrOPD) on Megatron-Core and vLLM.

``__all__`` is the public API: CONTRIBUTING.md says how one of these names may change. Each is
imported when it is asked for, so that the losses need torch alone, and the settings not even that.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "Episode",
    "EpisodeStart",
    "HiddenStatesSignal",
    "InputError",
    "LogitsSignal",
    "LossOutput",
    "LossTargets",
    "Method",
    "OnPolicyData",
    "OnPolicySettings",
    "RecordedTrajectories",
    "RolloutSource",
    "SampleKey",
    "SampledMethod",
    "SamplingEngines",
    "StepResult",
    "TeacherSource",
    "TeacherStart",
    "ToHF",
    "ToMegatron",
    "TokenSequence",
    "TokenStatistics",
    "TopKSignal",
    "TrainingError",
    "WeightChannel",
    "Writer",
    "hf_to_megatron",
    "learn",
    "load_config",
    "megatron_lm",
    "megatron_to_hf",
    "preset",
    "read_recorded",
    "tropd_loss",
    "tropd_loss_from_hidden",
]

_MODULES = {
    "base.errors": ("ConfigError", "InputError", "TrainingError"),
    "config": ("Config", "load_config"),
    "convert.to_hf": ("ToHF", "megatron_to_hf"),
    "convert.to_megatron": ("ToMegatron", "hf_to_megatron"),
    "data.recorded": ("RecordedTrajectories", "read_recorded"),
    "data.sequence": ("SampleKey", "TokenSequence", "Writer"),
    "distill.step": ("StepResult", "learn"),
    "integrations": ("megatron_lm",),
    "integrations.on_policy_data": ("OnPolicyData", "OnPolicySettings"),
    "losses": (
        *("HiddenStatesSignal", "LogitsSignal", "LossOutput", "LossTargets", "TopKSignal"),
        *("Method", "SampledMethod", "TokenStatistics", "preset", "tropd_loss"),
        *("tropd_loss_from_hidden",),
    ),
    "rollout.engines.interface": ("SamplingEngines",),
    "rollout.episodes": ("Episode", "EpisodeStart"),
    "rollout.source": ("RolloutSource",),
    "rollout.weights.interface": ("WeightChannel",),
    "teacher": ("TeacherSource", "TeacherStart"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if TYPE_CHECKING:  # what a type checker and an editor see
    from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
    from megatron_tropd.config import Config, load_config
    from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
    from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
    from megatron_tropd.data.recorded import RecordedTrajectories, read_recorded
    from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
    from megatron_tropd.distill.step import StepResult, learn
    from megatron_tropd.integrations import megatron_lm
    from megatron_tropd.integrations.on_policy_data import OnPolicyData, OnPolicySettings
    from megatron_tropd.losses import (
        HiddenStatesSignal,
        LogitsSignal,
        LossOutput,
        LossTargets,
        Method,
        SampledMethod,
        TokenStatistics,
        TopKSignal,
        preset,
        tropd_loss,
        tropd_loss_from_hidden,
    )
    from megatron_tropd.rollout.engines.interface import SamplingEngines
    from megatron_tropd.rollout.episodes import Episode, EpisodeStart
    from megatron_tropd.rollout.source import RolloutSource
    from megatron_tropd.rollout.weights.interface import WeightChannel
    from megatron_tropd.teacher import TeacherSource, TeacherStart


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    if hasattr(module, name):
        return getattr(module, name)
    return importlib.import_module(f"{module.__name__}.{name}")
