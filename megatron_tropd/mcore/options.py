"""Megatron's own options: from ``[megatron.*]`` of a config into Megatron's dataclasses.

Names and types are those of the installed version; what passes at all, ``megatron_fields`` says.
"""

import enum
import importlib.metadata
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import MegatronConfig, ParallelConfig, TrainConfig
from megatron_tropd.config.megatron_fields import Table
from megatron_tropd.config.settings import check_value, nearest
from megatron_tropd.mcore import platform


def with_options[T](
    cls: type[T], own: Mapping[str, Any], options: Mapping[str, Any], *, table: Table
) -> T:
    """An instance of one of Megatron's dataclasses.

    Args:
        cls: the dataclass.
        own: the fields that we set.
        options: the fields that the user set.
        table: where the user set them, for messages.

    Raises:
        ConfigError: there is no such field, it has another type, or Megatron refuses the options;
            its sentence is in the message.
    """
    asked = typed(cls, options, table=table)
    try:
        return cls(**{**own, **asked})
    except Exception as error:  # Megatron's checks raise what comes to mind
        if not asked:
            raise
        shown = ", ".join(f"{name} = {value!r}" for name, value in options.items())
        raise ConfigError(
            f"[megatron.{table}]: Megatron refuses {shown}: {str(error) or type(error).__name__}"
        ) from error


def ddp_config(parallel: ParallelConfig, megatron: MegatronConfig) -> DistributedDataParallelConfig:
    """Megatron's description of buckets and reduction; raises ConfigError if it refuses it."""
    own = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
        average_in_collective=False,
    )
    return with_options(DistributedDataParallelConfig, own, megatron.ddp, table="ddp")


def optimizer_config(
    train: TrainConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    megatron: MegatronConfig,
    *,
    model: TransformerConfig,
) -> OptimizerConfig:
    """Megatron's description of the optimizer; raises ConfigError if it refuses it."""
    own = dict(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=bool(megatron.ddp.get("overlap_param_gather")),
        fp8_recipe=model.fp8_recipe if model.fp8 else None,
        pin_cpu_grads=platform.has_cuda(),
        pin_cpu_params=platform.has_cuda(),
    )
    return with_options(OptimizerConfig, own, megatron.optimizer, table="optimizer")


def typed(cls: type, options: Mapping[str, Any], *, table: Table) -> dict[str, Any]:
    """The options as the dataclass has them: types of tensors, enumerations, tuples.

    Raises:
        ConfigError: there is no such field, or it has another type.
    """
    hints = _hints(cls)
    for name in options:
        if name not in hints:
            version = importlib.metadata.version("megatron-core")
            raise ConfigError(
                f"megatron.{table}.{name}: {cls.__name__} of Megatron-Core {version} has no such "
                f"field.{nearest(name, hints)}"
            )
    return {
        name: _as_megatron(hints[name], value, f"megatron.{table}.{name}")
        for name, value in options.items()
    }


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {name: hints[name] for name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


def _as_megatron(hint: Any, value: Any, where: str) -> Any:
    """A plain value as an annotation of Megatron's wants it; raises ConfigError if it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _as_one_of([a for a in args if a is not type(None)], value, where)
    if hint is torch.dtype:
        return _as_dtype(value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _as_member(hint, value, where)
    if origin in (list, tuple) or hint in (list, tuple):
        return _as_sequence(hint, value, where)
    check_value(hint, value, where)
    return float(value) if hint is float else value


def _as_one_of(hints: list[Any], value: Any, where: str) -> Any:
    problems = []
    for hint in hints:
        try:
            return _as_megatron(hint, value, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(" Or: ".join(problems))


def _as_dtype(value: Any, where: str) -> torch.dtype:
    dtypes = {name: t for name, t in vars(torch).items() if isinstance(t, torch.dtype)}
    if isinstance(value, str) and value in dtypes:
        return dtypes[value]
    near = nearest(value, dtypes) if isinstance(value, str) else ""
    raise ConfigError(
        f'{where} must be a type of torch in quotes, such as "float32" or "bfloat16", found '
        f"{value!r}.{near}"
    )


def _as_member(kind: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    names = list(kind.__members__)
    if isinstance(value, str) and value in names:
        return kind[value]
    near = nearest(value, names) if isinstance(value, str) else ""
    raise ConfigError(f"{where} must be one of {names}, found {value!r}.{near}")


def _as_sequence(hint: Any, value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if not isinstance(value, list):
        raise ConfigError(
            f"{where} must be a list such as [a, b], found {value!r} ({type(value).__name__})."
        )
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} elements, found {value!r}.")
        each = list(args)
    else:
        each = [args[0] if args else Any] * len(value)
    items = zip(each, value, strict=True)
    return kind(_as_megatron(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(items))
