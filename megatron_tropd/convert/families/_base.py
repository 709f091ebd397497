"""What a family states about itself, and what the rest of the package learns from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.families._ops import Operation


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that every layer has for an MLP."""

    count: int
    per_token: int
    """Experts a token is sent to."""
    ffn: int
    """Intermediate size of one expert."""
    normalized: bool
    """Whether the weights of the chosen experts sum to 1; else they are the softmax's over all."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one model, with every default of its config.json filled in."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Intermediate size of a dense MLP; a mixture's is in ``experts``."""
    vocab: int
    max_positions: int
    """As config.json says it, before any rotary scaling."""
    context: int
    """Longest sequence the model takes."""
    rms_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...] = ()
    """Per layer, how many positions a token attends to, itself included; None: all before it."""
    experts: Experts | None = None
    """None: dense."""

    @property
    def has_window(self) -> bool:
        """Whether some layer has a window."""
        return any(window is not None for window in self.windows)

    def megatron_fields(self) -> dict[str, Any]:
        """Say it in the names that Megatron's TransformerConfig and its arguments share."""
        fields: dict[str, Any] = {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.rms_eps,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.experts:
            fields |= {
                "moe_ffn_hidden_size": self.experts.ffn,
                "moe_router_topk": self.experts.per_token,
                "moe_router_pre_softmax": not self.experts.normalized,
            }
        return fields


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its checkpoint name, its layer, and how to make it.

    The name of an expert's parameter is the same for all experts of a layer, as Megatron's
    checkpoints stack them: ``decoder.layers.3.mlp.experts.experts.linear_fc1.weight``.
    """

    name: str
    operation: Operation
    layer: int | None = None
    """0-based layer; None outside the layers."""
    expert: int | None = None
    """0-based expert of that layer, over all expert-parallel ranks; None outside experts."""


@dataclass(frozen=True)
class Requirement:
    """A field of config.json that must have one of a few values, where it is present."""

    field: str
    """Dots lead into dictionaries."""
    allowed: tuple[Any, ...]
    remedy: str = "Choose a model without it."

    def check(self, config: PretrainedConfig) -> None:
        """Raise InputError if ``config`` has another value."""
        value: Any = config
        for name in self.field.split("."):
            value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if value is not None and value not in self.allowed:
            expected = " or ".join(map(repr, self.allowed)) or "none"
            raise InputError(
                f"This {config.model_type} model has {self.field} = {value!r}, expected "
                f"{expected}. {self.remedy}"
            )


COMMON_REQUIREMENTS = (
    Requirement("hidden_act", ("silu",)),
    Requirement("attention_bias", (False,)),
    Requirement("mlp_bias", (False,)),
    Requirement("rope_parameters.rope_type", ("default", "linear", "llama3")),
    Requirement("rope_parameters.partial_rotary_factor", (1.0,)),
    Requirement("partial_rotary_factor", (1.0,)),
    Requirement("quantization_config", (), "Convert the model to bfloat16 first."),
)
"""What no family supports."""


def full_attention(config: PretrainedConfig) -> tuple[int | None, ...]:
    """No layer has a window."""
    return _uniform(config, None)


def window_everywhere(config: PretrainedConfig) -> tuple[int | None, ...]:
    """``sliding_window`` is the window of every layer."""
    return _uniform(config, config.sliding_window)


def window_by_layer(config: PretrainedConfig) -> tuple[int | None, ...]:
    """``layer_types`` says which layers have the window ``sliding_window``."""
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = sorted(set(config.layer_types) - windows.keys())
    if unknown:
        raise _layer_types_error(config, unknown, list(windows))
    if config.sliding_window is None and "sliding_attention" in config.layer_types:
        raise InputError(
            f"This {config.model_type} model has sliding_attention in its layer_types, but no "
            "window: set sliding_window and use_sliding_window in config.json, or remove "
            "layer_types."
        )
    if len(config.layer_types) != config.num_hidden_layers:
        raise InputError(
            f"config.json has {len(config.layer_types)} layer_types for "
            f"{config.num_hidden_layers} layers, expected one for each."
        )
    return tuple(windows[kind] for kind in config.layer_types)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a family names the experts that every layer has: in config.json and in its tensors."""

    count: str
    """Key of the number of experts."""
    per_token: str = "num_experts_per_tok"
    ffn: str
    """Key of the intermediate size of one expert."""
    normalized: str | None = None
    """Key of :attr:`Experts.normalized`; None: they always are."""
    block: str
    """Name of the mixture within a layer."""
    gate_up_down: tuple[str, str, str]
    """Names of an expert's projections."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json must say beside the keys above, for every reader to see the experts."""

    @property
    def keys(self) -> dict[str, str]:
        """Field of :class:`Experts` -> key of config.json."""
        fields = {"count": self.count, "per_token": self.per_token, "ffn": self.ffn}
        return fields | ({"normalized": self.normalized} if self.normalized else {})

    def read(self, config: PretrainedConfig) -> Experts:
        """The experts of a config."""
        read = {name: getattr(config, key) for name, key in self.keys.items()}
        return Experts(**({"normalized": True} | read))

    def write(self, experts: Experts) -> dict[str, Any]:
        """The keys of config.json that say them."""
        return {key: getattr(experts, name) for name, key in self.keys.items()} | dict(self.written)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One file of this package: how a model type is recognised, read and refused."""

    model_type: str
    """Its name in config.json."""
    architecture: str
    """The transformers class; others of the same model type (classifiers) are refused."""
    layer: Callable[[ModelShape, str], list[Entry]] | None = None
    """(shape, HF prefix of a layer) -> its entries, names relative to the layer; None: those of
    ``_blocks.standard_layer``."""
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: Callable[[PretrainedConfig], tuple[int | None, ...]] = full_attention
    """Reads :attr:`ModelShape.windows`."""
    window_switch: bool = False
    """Whether ``use_sliding_window`` switches windows on."""
    mixture: Mixture | None = None
    """None: the family is dense."""
    keys: frozenset[str] = frozenset()
    """Keys of config.json that only this family reads."""
    ignores: tuple[str, ...] = ()
    """Fields of :data:`COMMON_REQUIREMENTS` that neither transformers nor vLLM reads here."""
    requirements: tuple[Requirement, ...] = ()
    """Beside :data:`COMMON_REQUIREMENTS`."""

    @property
    def has_windows(self) -> bool:
        """Whether layers can have a window of attention."""
        return self.windows is not full_attention

    @property
    def expert_keys(self) -> set[str]:
        """Keys of config.json that say the experts; two names of their number are in use."""
        if self.mixture is None:
            return set()
        return {"num_experts", "num_local_experts", *self.mixture.keys.values()}

    @property
    def windows_by_layer(self) -> bool:
        """Whether config.json says layer by layer which ones have it."""
        return self.windows is window_by_layer


def _uniform(config: PretrainedConfig, window: int | None) -> tuple[int | None, ...]:
    # transformers ignores layer_types here, other readers of the folder may not.
    expected = "full_attention" if window is None else "sliding_attention"
    others = sorted(set(getattr(config, "layer_types", None) or [expected]) - {expected})
    if others:
        raise _layer_types_error(config, others, [expected])
    return (window,) * config.num_hidden_layers


def _layer_types_error(
    config: PretrainedConfig, found: list[str], expected: list[str]
) -> InputError:
    return InputError(
        f"This {config.model_type} model has layer_types {', '.join(found)}, expected only "
        f"{' or '.join(expected)}. Choose a model without them."
    )
