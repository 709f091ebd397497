"""Where each parameter of a plan lies in a Megatron ``torch_dist`` checkpoint.

Megatron stores equal layers as one tensor with the layer as its first dimension, experts as its
second: ``decoder.layers.self_attention.linear_qkv.weight`` is [layers, rows, columns]. The dense
names of the local and of the Transformer-Engine layers agree. Those of mixture-of-experts layers
do not (the norm before the experts), and both kinds expect ``_extra_state`` objects, which are
empty outside FP8: all of them are written.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tropd.convert.families import Entry, model_shape, plan

OTHER_STATE = (
    "optimizer.",
    "chained_",
    "opt_param_scheduler",
    "rng",
    "rerun_state_machine_state",
    "common_state",
)
"""Beginnings of the names of what a training checkpoint holds besides the model."""

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
_LAYERED = "decoder.layers."
_MOE_NORM = "decoder.layers.pre_mlp_layernorm.weight"
_MOE_NORM_LOCAL = "decoder.layers.mlp.linear_fc1.layer_norm_weight"

# Modules that carry an extra state: Transformer Engine's linear layers, norms and attention, and
# Megatron's own linear layers, which answer None to stay compatible.
_ATTENTION = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
)
_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
_MOE = ("pre_mlp_layernorm",)
_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class StoredPart:
    """One part of one tensor of the checkpoint."""

    key: str
    lead: tuple[int, ...]
    """Position in the leading dimensions: (), (layer,) or (layer, expert)."""
    leads: tuple[int, ...]
    """Sizes of the leading dimensions."""


@dataclass(frozen=True)
class CheckpointLayout:
    """Everything the model part of a checkpoint consists of."""

    entries: list[Entry]
    places: list[StoredPart]
    """Of the entries, in their order."""
    copies: dict[str, str]
    """Stored a second time under another name: name -> original."""
    objects: list[str]
    """Unique names of the (empty) extra states."""
    padded_vocab: int

    def pairs(self) -> Iterator[tuple[Entry, StoredPart]]:
        """Entries with their places."""
        return zip(self.entries, self.places, strict=True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor but the copies."""
        return {p.key: (*p.leads, *e.operation.shard_shape(1)) for e, p in self.pairs()}


def checkpoint_layout(hf_config: dict[str, Any], padded_vocab: int) -> CheckpointLayout:
    """Lay a model out.

    Raises:
        InputError: the architecture is not supported.
    """
    entries = plan(hf_config, padded_vocab)
    layers = model_shape(hf_config).layers
    experts = 1 + max((_expert(entry) for entry in entries), default=-1)
    places = [_place(entry, layers, experts) for entry in entries]
    keys = {place.key for place in places}
    copies = {_MOE_NORM_LOCAL: _MOE_NORM} if _MOE_NORM in keys else {}
    return CheckpointLayout(
        entries, places, copies, _extra_states(keys, layers, experts), padded_vocab
    )


def object_name(key: str, position: Sequence[int], sizes: Sequence[int]) -> str:
    """The name under which Megatron stores one part of a sharded object."""
    spelled = (".".join(map(str, numbers)) for numbers in (position, sizes))
    return f"{key}/shard_{'_'.join(spelled)}"


def per_layer_names(place: StoredPart) -> list[str]:
    """Names of the same part in a checkpoint that stores every layer (and expert) on its own."""
    if not place.lead:
        return []
    numbered = place.key.replace(_LAYERED, f"{_LAYERED}{place.lead[0]}.", 1)
    if len(place.lead) == 2:
        numbered = numbered.replace(".experts.experts.", f".experts.experts.{place.lead[1]}.", 1)
    return [numbered]


def is_other_state(name: str) -> bool:
    """Whether a stored name belongs to the optimizer, the scheduler or the random states."""
    return name.startswith(OTHER_STATE)


def is_extra_state(name: str) -> bool:
    """Whether a stored name is an extra state of a layer."""
    return "._extra_state" in name


def _expert(entry: Entry) -> int:
    return -1 if entry.expert is None else entry.expert


def _place(entry: Entry, layers: int, experts: int) -> StoredPart:
    if entry.layer is None:
        return StoredPart(entry.name, (), ())
    key = _LAYER.sub(_LAYERED, entry.name)
    if _expert(entry) < 0:
        return StoredPart(key, (entry.layer,), (layers,))
    return StoredPart(key, (entry.layer, _expert(entry)), (layers, experts))


def _extra_states(keys: set[str], layers: int, experts: int) -> list[str]:
    modules = list(_ATTENTION)
    if any("q_layernorm" in key for key in keys):
        modules += _QK_NORMS
    modules += _MOE if experts else _DENSE
    names = [
        object_name(f"{_LAYERED}{module}._extra_state", (layer,), (layers,))
        for module in modules
        for layer in range(layers)
    ]
    names += [
        object_name(f"{_LAYERED}{module}._extra_state", (layer, expert), (layers, experts))
        for module in (_EXPERTS if experts else ())
        for layer in range(layers)
        for expert in range(experts)
    ]
    return [*names, object_name("decoder.final_layernorm._extra_state", (0,), (1,))]
