"""Megatron's options that change what a GPU holds, as the plan counts them.

What each does was read in megatron-core 0.19.2: recompute.py, transformer/transformer_layer.py,
optimizer/distrib_optimizer.py, optimizer/cpu_offloading. Their types and names are checked by the
trainer, ranges by ``MegatronConfig``; here only what the arithmetic needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import MegatronConfig
from megatron_tropd.config.settings import check_value

COUNTED = {
    "model": {
        *("recompute_granularity", "recompute_method", "recompute_num_layers"),
        *("recompute_modules", "distribute_saved_activations", "moe_layer_recompute"),
        *("fine_grained_activation_offloading", "offload_modules", "activation_offload_fraction"),
    },
    "optimizer": {
        *("optimizer_cpu_offload", "optimizer_offload_fraction", "use_precision_aware_optimizer"),
        *("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype", "store_param_remainders"),
    },
    "ddp": {"grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather"},
    "teacher": set[str](),
}
"""Options that the plan counts, by table."""
_DEFAULT_MODULES = ("core_attn",)
"""Megatron's own choice for selective recomputation."""
_ATTENTION = frozenset({"attn_proj", "core_attn", "qkv_linear"})
"""Modules of a dense layer whose inputs can go to the host; Megatron has none of its MLP."""
Offload = Literal["none", "host", "host_by_layer"]
"""``teacher.offload``."""
_BYTES = {"float32": 4, "fp32": 4, "float16": 2, "fp16": 2, "bfloat16": 2, "bf16": 2}
_ONE_BYTE = {"uint8": 1, "fp8": 1}


@dataclass(frozen=True)
class Recompute:
    """What is not kept for the backward pass but computed again in it."""

    method: Literal["none", "uniform", "block", "selective"] = "none"
    """Of whole layers, in units or the first of each stage; or modules of every layer."""
    layers: int = 0
    """uniform: of a unit; block: of a stage."""
    modules: frozenset[str] = frozenset()
    """selective: which modules."""
    distributed: bool = False
    """Whether the inputs of units are sharded over the tensor-parallel ranks."""

    def whole_layers(self, layers: int) -> int:
        """Layers of a stage that keep nothing but their input."""
        return {"uniform": layers, "block": min(self.layers, layers)}.get(self.method, 0)

    def unit(self, layers: int) -> int:
        """Layers of a stage that are computed again together."""
        if self.method == "uniform":
            return min(self.layers, layers)
        return min(1, self.whole_layers(layers))


@dataclass(frozen=True)
class States:
    """How the optimizer keeps its states."""

    on_host: float = 0.0
    """Share of the parameters whose moments the host keeps and updates."""
    main: float = 4.0
    """Bytes of a main weight of bfloat16 weights."""
    moments: float = 8.0
    """Bytes of both moments."""
    precision_aware: bool = False
    """Whether main weights are the optimizer's own; else the GPU keeps those of the parameters
    that the host updates, too."""


@dataclass(frozen=True)
class Options:
    """What saves memory: of the student, but for ``teacher``."""

    recompute: Recompute = Recompute()
    offload: frozenset[str] = frozenset()
    """Modules whose inputs go to the host until the backward pass."""
    offload_fraction: float = 1.0
    states: States = States()
    teacher: Offload = "none"
    """Where the teacher's layers are while they do not score."""
    gradients_in_fp32: bool = True
    overlap_gradients: bool = False
    """Whether gradients are reduced beside the last backward pass."""
    uncounted: tuple[str, ...] = ()
    """Options that the plan does not know."""


def options(megatron: MegatronConfig, *, teacher: Offload = "none") -> Options:
    """Read the tables ``[megatron.*]`` of a config.

    Args:
        megatron: the tables.
        teacher: ``teacher.offload``.

    Raises:
        ConfigError: a value that Megatron would refuse and that the plan cannot count.
    """
    ddp = megatron.ddp
    return Options(
        recompute=_recompute(megatron.model),
        **_offload(megatron.model),
        states=_states(megatron.optimizer),
        teacher=teacher,
        gradients_in_fp32=bool(ddp.get("grad_reduce_in_fp32", True)),
        overlap_gradients=bool(ddp.get("overlap_grad_reduce", False)),
        uncounted=tuple(
            f"{table}.{name}"
            for table, known in COUNTED.items()
            for name in getattr(megatron, table)
            if name not in known
        ),
    )


def tables(chosen: Options) -> dict[str, dict[str, Any]]:
    """The options that were searched, as the config names them: table -> option -> value."""
    model, optimizer = _recompute_table(chosen.recompute), dict[str, Any]()
    if chosen.offload:
        model["fine_grained_activation_offloading"] = True
        model["offload_modules"] = sorted(chosen.offload)
        if chosen.offload_fraction < 1:
            model["activation_offload_fraction"] = chosen.offload_fraction
    if chosen.states.on_host:
        optimizer["optimizer_cpu_offload"] = True
        optimizer["optimizer_offload_fraction"] = chosen.states.on_host
        optimizer["use_precision_aware_optimizer"] = chosen.states.precision_aware
    return {k: v for k, v in {"model": model, "optimizer": optimizer}.items() if v}


def can_be_rehearsed(chosen: Options) -> bool:
    """Whether it works without Transformer Engine, so that a rehearsal can confirm it."""
    return not chosen.states.on_host and not chosen.offload


def describe_options(chosen: Options) -> list[str]:
    """What is recomputed and offloaded, a few words each."""
    recompute, parts = chosen.recompute, []
    if recompute.method == "selective":
        parts.append(f"recompute {' and '.join(sorted(recompute.modules)) or 'nothing'}")
    elif recompute.method == "block":
        parts.append(f"recompute {recompute.layers} layers of a stage")
    elif recompute.method == "uniform":
        each = f" in units of {recompute.layers}" if recompute.layers > 1 else ""
        parts.append(f"recompute all layers{each}")
    if chosen.offload:
        parts.append(f"activations of {' and '.join(sorted(chosen.offload))} on the host")
    if chosen.states.on_host:
        parts.append(f"{100 * chosen.states.on_host:g} % of the optimizer on the host")
    if chosen.states.precision_aware and not chosen.states.on_host:
        parts.append("precision-aware optimizer")
    if not chosen.gradients_in_fp32:
        parts.append("gradients not in fp32")
    if chosen.teacher != "none":
        by_layer = ", layer by layer" if chosen.teacher == "host_by_layer" else ""
        parts.append(f"teacher on the host{by_layer}")
    return parts


@dataclass(frozen=True)
class Savings:
    """What a layout can do to save memory."""

    layers: int
    """Of the student, in the largest chunk of a stage."""
    mixture: bool
    """Whether the student is a mixture of experts."""
    offloads: bool
    """Whether there is a host to offload to."""
    teacher: bool
    """Whether the teacher can wait there."""
    one_teacher: bool
    """Whether it can stay on the GPU: several are there one at a time."""
    optimizer: bool
    """Whether the optimizer can: Megatron's hybrid one is a kind of distributed one."""

    def ways(self, configured: Options) -> list[Options]:
        """Every combination, all else as configured; the last needs the fewest bytes.

        What the config offloads of activations and optimizer, or keeps in lower precision, stays.
        """
        recomputed = [(way, configured.offload) for way in self._recomputed()]
        if self.offloads and not self.mixture and not configured.offload:
            recomputed.insert(-1, (recomputed[1][0], _ATTENTION))
        states, teacher = [configured.states], [configured.teacher]
        if self.optimizer and not configured.states.precision_aware:
            states += [States(on_host=share, precision_aware=True) for share in (0.5, 1.0)]
        if self.teacher:
            teacher = ["host", "host_by_layer"]
            if self.one_teacher:
                teacher.insert(0, "none")
        return [
            replace(configured, recompute=way, offload=away, states=kept, teacher=waits)
            for kept, waits, (way, away) in product(states, teacher, recomputed)
        ]

    def _recomputed(self) -> list[Recompute]:
        """Nothing, the MLPs or mixtures, some layers of a stage, all of them."""
        modules = frozenset({"moe" if self.mixture else "mlp"})
        parts = sorted({-(-self.layers * n // 4) for n in (1, 2, 3)} - {self.layers})
        return [
            Recompute(),
            Recompute(method="selective", modules=modules),
            *(Recompute(method="block", layers=part) for part in parts),
            Recompute(method="uniform", layers=1),
        ]


def effort(chosen: Options) -> int:
    """How much an option complicates a run: the fewer parts, the better understood."""
    kinds = {"none": 0, "selective": 1, "block": 2, "uniform": 2}
    waits = {"none": 0, "host": 1, "host_by_layer": 2}
    return (
        kinds[chosen.recompute.method]
        + waits[chosen.teacher]
        + 4 * bool(chosen.states.on_host)
        + 8 * bool(chosen.offload)
    )


def _recompute_table(recompute: Recompute) -> dict[str, Any]:
    if recompute.method == "none":
        return {}
    if recompute.method == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": sorted(recompute.modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.layers,
    }


def _recompute(model: Mapping[str, Any]) -> Recompute:
    granularity = model.get("recompute_granularity")
    method: Any = model.get("recompute_method")
    if model.get("moe_layer_recompute", False):  # its old name
        modules = _modules(model) | {"moe"}
        return Recompute(method="selective", modules=modules)
    if granularity is None:
        return Recompute()
    if granularity == "selective":
        return Recompute(method="selective", modules=_modules(model))
    _one_of(granularity, ("full", "selective"), "recompute_granularity")
    _one_of(method, ("uniform", "block"), "recompute_method")
    layers = model.get("recompute_num_layers")
    if layers is None:
        raise ConfigError(
            'recompute_granularity = "full" needs megatron.model.recompute_num_layers: how many '
            "layers are computed again together, or in a stage. Set it."
        )
    check_value(int, layers, "megatron.model.recompute_num_layers")
    shared = bool(model.get("distribute_saved_activations", False))
    return Recompute(method=method, layers=layers, distributed=shared)


def _modules(model: Mapping[str, Any]) -> frozenset[str]:
    return _names(model.get("recompute_modules", _DEFAULT_MODULES), "recompute_modules")


def _offload(model: Mapping[str, Any]) -> dict[str, Any]:
    if not model.get("fine_grained_activation_offloading", False):
        return {}
    fraction = _share(model, "activation_offload_fraction", 1.0, table="model")
    return {
        "offload": _names(model.get("offload_modules", ()), "offload_modules"),
        "offload_fraction": fraction,
    }


def _states(optimizer: Mapping[str, Any]) -> States:
    aware = bool(optimizer.get("use_precision_aware_optimizer", False))
    if optimizer.get("optimizer_cpu_offload", False):
        # The hybrid optimizer keeps float32, whatever the types that were asked for; only with
        # precision awareness does it start from the bfloat16 weights, else from main weights that
        # stay on the GPU.
        share = _share(optimizer, "optimizer_offload_fraction", 0.0, table="optimizer")
        return States(on_host=share, precision_aware=aware)
    if not aware:
        return States()
    main = _bytes(optimizer, "main_params_dtype", _BYTES)
    if main == 4 and optimizer.get("store_param_remainders", True):
        main = 2  # the 16 bits that the bfloat16 weight lacks
    known = _BYTES | _ONE_BYTE
    moments = sum(_bytes(optimizer, name, known) for name in ("exp_avg_dtype", "exp_avg_sq_dtype"))
    return States(main=main, moments=moments, precision_aware=True)


def _bytes(optimizer: Mapping[str, Any], name: str, known: Mapping[str, int]) -> int:
    value = str(optimizer.get(name, "float32")).removeprefix("torch.")
    _one_of(value, tuple(known), name, "optimizer")
    return known[value]


def _share(options: Mapping[str, Any], name: str, default: float, *, table: str) -> float:
    value = options.get(name, default)
    check_value(float, value, f"megatron.{table}.{name}")
    return float(value)


def _names(value: Any, name: str) -> frozenset[str]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"megatron.model.{name} must be a list of names, found {value!r}.")
    return frozenset(value)


def _one_of(value: Any, known: tuple[str, ...], name: str, table: str = "model") -> None:
    if value not in known:
        raise ConfigError(
            f"megatron.{table}.{name} must be one of {', '.join(known)}, found {value!r}. "
            "Change it."
        )
