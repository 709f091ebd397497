"""Settings of a run. Needs the standard library alone."""

from megatron_tropd.config.loss import LossSettings
from megatron_tropd.config.megatron import MegatronConfig
from megatron_tropd.config.run import (
    Config,
    EvaluationConfig,
    GuidanceConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    PromptConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    default_settings,
    is_run_settings,
    load_config,
    read_settings,
    settings_from_table,
)

__all__ = [
    "Config",
    "EvaluationConfig",
    "GuidanceConfig",
    "LoraConfig",
    "LossSettings",
    "MegatronConfig",
    "ModelConfig",
    "ParallelConfig",
    "PromptConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "config_to_toml",
    "default_settings",
    "is_run_settings",
    "load_config",
    "read_settings",
    "settings_from_table",
]
