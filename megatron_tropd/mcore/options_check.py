"""Megatron's own options, checked before anything is built."""

import dataclasses
import os
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config, ParallelConfig
from megatron_tropd.config.megatron import MegatronConfig
from megatron_tropd.config.megatron_fields import Table, verdicts
from megatron_tropd.config.run import SELF, reference_of
from megatron_tropd.convert.adapters import check_lora
from megatron_tropd.convert.families import model_shape
from megatron_tropd.mcore import models, platform
from megatron_tropd.mcore.options import ddp_config, optimizer_config, typed

DATACLASSES: dict[Table, type] = {
    "model": TransformerConfig,
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
    "teacher": TransformerConfig,
}
"""Table of a config -> whose fields it has."""


def check_types(megatron: MegatronConfig) -> None:
    """Check names and types alone: for a plan, which is made for another machine.

    Raises:
        ConfigError: the installed Megatron has no such field, or it has another type.
    """
    for table, options in megatron.tables():
        typed(DATACLASSES[table], options, table=table)


def check_options(config: Config, **configs: dict[str, Any]) -> None:
    """Check that this machine can build what the options ask for.

    Args:
        config: of the run.
        configs: content of each config.json, by what the model is to the run (``Inputs.folders``).

    Raises:
        ConfigError: a name or a type is wrong, something is missing here, options do not go
            together, or Megatron refuses them.
    """
    megatron, parallel, student = config.megatron, config.parallel, configs["student"]
    check_types(megatron)
    for table, options in megatron.tables():
        _check_virtual_pipeline(table, options, config.parallel_of(_model_of(table)))
        _check_machine(table, options)
    check_teacher_is_built(config)
    _check_recomputation(megatron.model)
    _check_overlap(config)
    dtype = models.resolve_dtype(config.model.dtype)
    _check_offloading(megatron, dtype)
    _check_scaling(megatron.teacher)
    built = _built("model", student, config, dtype)
    if megatron.optimizer.get("apply_wd_to_qk_layernorm") and not built.qk_layernorm:
        raise ConfigError(
            "megatron.optimizer.apply_wd_to_qk_layernorm is for models that normalise queries and "
            "keys, and the student has no such norms. Remove it."
        )
    if config.model.lora is not None:
        grouped = bool(built.moe_grouped_gemm)
        check_lora(model_shape(student), config.model.lora, grouped_experts=grouped)
        _check_frozen_weights(megatron.optimizer)
    for who, alone in config.by_teacher.items():
        for name in (who, reference_of(who)):
            if name in configs and alone.loads_teacher:
                _built("teacher", configs[name], alone, dtype)
    ddp_config(parallel, megatron)
    optimizer_config(config.train, parallel, dtype, megatron, model=built)


def check_teacher_is_built(config: Config) -> None:
    """Refuse options of a teacher if no teacher of the run is a model that they could build."""

    def has_none(alone: Config) -> bool:
        borrows = alone.teacher.ema_decay is not None or alone.model.lora is not None
        of_student = alone.teacher.placement == SELF and borrows
        return of_student or alone.teacher.placement == "served"

    if config.megatron.teacher and all(map(has_none, config.by_teacher.values())):
        raise ConfigError(
            "[megatron.teacher] is for a model of the teacher's own, and this run builds none: its "
            "teacher is served, or the student's own modules. Remove it."
        )


def _built(
    table: Literal["model", "teacher"],
    about: dict[str, Any],
    config: Config,
    dtype: torch.dtype,
) -> TransformerConfig:
    """Megatron's description of a model, whose options all do something."""
    options, shape = getattr(config.megatron, table), model_shape(about)
    of_experts = [name for name in options if name.startswith("moe_")]
    if of_experts and shape.experts is None:
        raise ConfigError(
            f"megatron.{table}.{of_experts[0]} is for mixtures of experts, and this model is "
            "dense. Remove it."
        )
    modules = set(options.get("recompute_modules", ()))
    if shape.experts is None and (unused := modules & {"moe", "moe_act", "shared_experts"}):
        raise ConfigError(
            f"megatron.{table}.recompute_modules: {', '.join(sorted(unused))} is of mixtures of "
            'experts, and this model is dense. Say "mlp" for its MLPs.'
        )
    parallel = config.parallel_of(_model_of(table))
    built = models.transformer_config(shape, parallel, dtype, options, table=table)
    if built.activation_func_fp8_input_store and not built.bias_activation_fusion:
        raise ConfigError(
            f"megatron.{table}.activation_func_fp8_input_store does nothing without "
            f"megatron.{table}.bias_activation_fusion = true. Set that, too, or remove this one."
        )
    return built


def _model_of(table: Table) -> str:
    """Whose options a table has."""
    return "teacher" if table == "teacher" else "student"


def unreviewed(megatron: MegatronConfig) -> list[str]:
    """The options that are set and that nobody has looked at: of a newer Megatron."""
    return [
        f"megatron.{table}.{name}"
        for table, options in megatron.tables()
        for name in options
        if name not in verdicts(table)
    ]


def _check_machine(table: Table, options: dict[str, Any]) -> None:
    """Refuse what needs a library or a device that is not here."""
    defaults = {f.name: f.default for f in dataclasses.fields(DATACLASSES[table])}
    for name, value in typed(DATACLASSES[table], options, table=table).items():
        verdict = verdicts(table).get(name)
        if verdict is None or not verdict.needs or value == defaults[name]:
            continue
        here = {"CUDA": platform.has_cuda(), "Transformer Engine": models.has_transformer_engine()}
        if not here[verdict.needs]:
            raise _missing(f"megatron.{table}.{name} = {options[name]!r}", verdict.needs)


def _check_virtual_pipeline(
    table: Table, options: dict[str, Any], parallel: ParallelConfig
) -> None:
    """Refuse batches of sends, in which two stages would mix up both directions."""
    if parallel.virtual_pipeline > 1 and options.get("batch_p2p_comm"):
        raise ConfigError(
            f"megatron.{table}.batch_p2p_comm = true does not go with parallel.virtual_pipeline = "
            f"{parallel.virtual_pipeline}, whose stages send in one direction at a time. Remove it."
        )


def _check_recomputation(model: dict[str, Any]) -> None:
    """Refuse modules that Megatron would not look at, or drops by Transformer Engine's means."""
    if "recompute_modules" in model and model["recompute_granularity"] != "selective":
        raise ConfigError(
            'megatron.model.recompute_modules is for recompute_granularity = "selective", found '
            f"{model['recompute_granularity']!r}. Change one of the two."
        )
    if model.get("recompute_modules") == []:
        raise ConfigError(
            "megatron.model.recompute_modules = [] recomputes nothing. Name modules (Megatron's "
            'default is ["core_attn"]), or remove it and recompute_granularity.'
        )
    asked = set(model.get("recompute_modules", ())) & {"layernorm", "moe_act"}
    if asked and not models.has_transformer_engine():
        raise _missing(
            f"{', '.join(sorted(asked))} in megatron.model.recompute_modules", "Transformer Engine"
        )


def _missing(what: str, needs: str) -> ConfigError:
    return ConfigError(
        f"{what} needs {_wanted(needs)}, found {_found()}. Remove it here (tropd doctor says what "
        "is installed)."
    )


def _wanted(needs: str) -> str:
    return "a CUDA device" if needs == "CUDA" else f"{needs} on CUDA"


def _found() -> str:
    if not platform.has_cuda():
        return "no CUDA device"
    return "a CUDA device, but no Transformer Engine that imports"


def _check_overlap(config: Config) -> None:
    ddp = config.megatron.ddp
    for name in ("pad_buckets_for_high_nccl_busbw", "reduce_scatter_with_fp32_accumulation"):
        if ddp.get(name) and not config.parallel.distributed_optimizer:
            raise ConfigError(
                f"megatron.ddp.{name} does nothing without parallel.distributed_optimizer = true. "
                "Set that, too, or remove this one."
            )
    # Only if it is asked for by name: "auto" is float32 on a machine that merely looks at a config.
    if not ddp.get("grad_reduce_in_fp32", True) and config.model.dtype == "float32":
        raise ConfigError(
            "megatron.ddp.grad_reduce_in_fp32 = false lets gradients travel in the type of the "
            'weights, which model.dtype = "float32" makes float32: it does nothing. Set '
            'model.dtype = "bfloat16", or remove it.'
        )
    if ddp.get("reduce_scatter_with_fp32_accumulation") and ddp.get("grad_reduce_in_fp32", True):
        raise ConfigError(
            "megatron.ddp.reduce_scatter_with_fp32_accumulation is for gradients that travel in "
            "bfloat16, and here they do in float32. Set megatron.ddp.grad_reduce_in_fp32 = false, "
            "too, or remove this one."
        )
    if not ddp.get("overlap_param_gather"):
        return
    # Megatron's DDP does not look; its command line does.
    if not config.parallel.distributed_optimizer:
        raise ConfigError(
            "megatron.ddp.overlap_param_gather gathers what the distributed optimizer has spread: "
            "set parallel.distributed_optimizer = true, or remove it."
        )
    if not ddp.get("overlap_grad_reduce"):
        raise ConfigError(
            "megatron.ddp.overlap_param_gather needs megatron.ddp.overlap_grad_reduce = true, "
            "whose buckets it gathers, found false. Change one of the two."
        )


def _check_frozen_weights(optimizer: dict[str, Any]) -> None:
    """Refuse what is for weights that a student with adapters does not train."""
    about = {
        "decoupled_lr": "embedding and output layer",
        "decoupled_min_lr": "embedding and output layer",
        "apply_wd_to_qk_layernorm": "norms of queries and keys",
    }
    for name, weights in about.items():
        if optimizer.get(name):
            raise ConfigError(
                f"megatron.optimizer.{name} is for {weights}, which [model.lora] freezes. Remove "
                "one of the two."
            )


def _check_offloading(megatron: MegatronConfig, dtype: torch.dtype) -> None:
    if megatron.optimizer.get("optimizer_cpu_offload"):
        _check_offloaded_optimizer(megatron.optimizer, dtype)
    if not megatron.model.get("fine_grained_activation_offloading"):
        return
    from megatron.core.utils import is_te_min_version

    if is_te_min_version("2.10.0") and os.environ.get("NVTE_CPU_OFFLOAD_V1", "0") != "1":
        raise ConfigError(
            "megatron.model.fine_grained_activation_offloading needs the environment variable "
            "NVTE_CPU_OFFLOAD_V1=1 from Transformer Engine 2.10 on: without it weights are "
            "offloaded too. Export it and start again."
        )


def _check_offloaded_optimizer(optimizer: dict[str, Any], dtype: torch.dtype) -> None:
    offload = "megatron.optimizer.optimizer_cpu_offload"
    if not optimizer.get("use_precision_aware_optimizer"):
        raise ConfigError(
            f"{offload} needs megatron.optimizer.use_precision_aware_optimizer = true, whose path "
            "it takes. Set it too."
        )
    if ignored := optimizer.keys() & {"exp_avg_dtype", "exp_avg_sq_dtype"}:
        raise ConfigError(
            f"{offload} keeps Adam's states in float32, so {', '.join(sorted(ignored))} beside it "
            "would do nothing. Remove one of the two."
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f'{offload} needs model.dtype = "bfloat16", found {dtype}: Megatron\'s optimizer takes '
            "no slices of float32 parameters. Change one of the two."
        )


def _check_scaling(teacher: dict[str, Any]) -> None:
    if teacher.get("fp8") and teacher.get("fp8_recipe", "delayed") == "delayed":
        raise ConfigError(
            'megatron.teacher.fp8 with fp8_recipe = "delayed" (Megatron\'s default): delayed '
            "scaling takes its factors from training passes, of which the teacher has none. Set "
            'megatron.teacher.fp8_recipe = "tensorwise", "blockwise" or "mxfp8".'
        )
