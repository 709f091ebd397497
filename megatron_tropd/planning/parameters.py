"""How many parameters a model has, and how many of them each rank holds.

Counted from the table that also reads and converts the weights (``convert.families.plan``), so
that what is planned is what is built.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import LoraConfig, ParallelConfig
from megatron_tropd.convert.adapters import adapter_plan
from megatron_tropd.convert.families import Entry, ModelShape, model_shape, plan
from megatron_tropd.convert.hf_folder import naming, read_config
from megatron_tropd.convert.megatron_folder import companions_of
from megatron_tropd.convert.sizes import stage_sizes


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank. Experts are apart: other ranks hold the same ones."""

    dense: int
    """Norms, attention, routers, dense MLPs, embeddings: alike in all data-parallel replicas."""
    experts: int
    """Of the experts this rank holds: alike in ``ParallelConfig.expert_replicas`` ranks."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.dense + self.experts


@dataclass(frozen=True)
class PlannedModel:
    """The architecture of one side of the pair."""

    who: str
    """"student", "teacher" or "reference"."""
    config: dict[str, Any]
    shape: ModelShape

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied output layer once, no padding."""
        return sum(_counts(self.key, None, 1).values())

    @cached_property
    def active(self) -> int:
        """Parameters that one token is multiplied with in the layers (no vocabulary)."""
        return _counts(self.key, None, 1)["layer"] + self.active_experts

    @cached_property
    def active_experts(self) -> int:
        """Those of them that are experts'."""
        experts = self.shape.experts
        return self.in_experts * experts.per_token // experts.count if experts else 0

    @cached_property
    def in_experts(self) -> int:
        """Parameters of all experts of all layers."""
        return _counts(self.key, None, 1)["expert"]

    def on_rank(self, parallel: ParallelConfig, stage: int, padded_vocab: int) -> RankParameters:
        """Parameters of each rank of a pipeline stage.

        The first stage has the embedding, the last one the output layer; a tied output layer is
        the embedding itself, of which the last of several stages has a copy.
        """
        counts = _counts(self.key, padded_vocab, parallel.tensor)
        layers = self.shape.layers
        share = _layers_of(layers, parallel, stage)
        dense = counts["layer"] // layers * share
        whole = _counts(self.key, padded_vocab, parallel.shards_of_expert)
        experts = whole["expert"] // layers * share // parallel.expert
        if stage == 0:
            dense += counts["embedding"]
        if stage == parallel.pipeline - 1:
            copy = counts["embedding"] if self.shape.tied and parallel.pipeline > 1 else 0
            dense += counts["final"] + counts["output"] + copy
        return RankParameters(dense, experts)

    def adapters_on_rank(
        self, lora: LoraConfig, parallel: ParallelConfig, stage: int
    ) -> RankParameters:
        """The same of adapters beside its layers."""
        layers = self.shape.layers
        share = _layers_of(layers, parallel, stage)
        dense = _adapter_counts(self.key, lora, parallel.tensor)["layer"]
        experts = _adapter_counts(self.key, lora, parallel.shards_of_expert)["expert"]
        return RankParameters(dense // layers * share, experts // layers * share // parallel.expert)

    def adapters(self, lora: LoraConfig) -> int:
        """All parameters of adapters beside its layers."""
        return sum(_adapter_counts(self.key, lora, 1).values())

    def parts_on_rank(self, parallel: ParallelConfig, stage: int, padded_vocab: int) -> list[int]:
        """Parameters of the embedding, unless the output layer is the same, and of each layer.

        Those of a frozen model that ``teacher.offload`` moves.
        """
        held = self.on_rank(parallel, stage, padded_vocab).total
        counts, last = _counts(self.key, padded_vocab, parallel.tensor), parallel.pipeline - 1
        is_output = self.shape.tied and stage == last
        embedding = counts["embedding"] if stage == 0 and not is_output else 0
        stays = counts["final"] + counts["output"] if stage == last else 0
        stays += counts["embedding"] * is_output
        layers = _layers_of(self.shape.layers, parallel, stage)
        layer = (held - embedding - stays) // layers
        return [embedding] * bool(embedding) + [layer] * layers

    @cached_property
    def key(self) -> str:
        """config.json as text."""
        return json.dumps(self.config, sort_keys=True)


def open_architecture(path: str, who: str) -> PlannedModel:
    """The architecture in a model folder. Weights are not needed: config.json is enough.

    Args:
        path: HF folder, a folder with nothing but config.json, or a Megatron checkpoint.

    Raises:
        InputError: there is no such folder, no readable config.json, or its architecture is not
            supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"The {who}'s folder {folder} does not exist. Give a folder that holds config.json; "
            "planning needs no weights."
        )
    config = read_config(companions_of(folder))
    with naming(f"The {who}'s folder {folder}"):
        return PlannedModel(who, config, model_shape(config))


def _layers_of(layers: int, parallel: ParallelConfig, stage: int) -> int:
    """Layers of a stage, those of all its chunks."""
    return stage_sizes(layers, parallel.pipeline, parallel.virtual_pipeline)[stage]


@lru_cache(maxsize=64)
def _counts(config: str, padded_vocab: int | None, tensor: int) -> Counter[str]:
    """Parameters on each of ``tensor`` ranks, by :func:`_kind`, over all layers and experts."""
    return _counted(_entries(config, padded_vocab), tensor)


@lru_cache(maxsize=64)
def _adapter_counts(config: str, lora: LoraConfig, tensor: int) -> Counter[str]:
    """The same of adapters."""
    read = json.loads(config)
    return _counted(_of_each_size(adapter_plan(read, lora), model_shape(read)), tensor)


def _counted(entries: list[tuple[Entry, int]], tensor: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry, copies in entries:
        counts[_kind(entry)] += copies * prod(entry.operation.shard_shape(tensor))
    return counts


@lru_cache(maxsize=8)
def _entries(config: str, padded_vocab: int | None) -> list[tuple[Entry, int]]:
    read = json.loads(config)
    return _of_each_size(plan(read, padded_vocab), model_shape(read))


def _of_each_size(entries: list[Entry], shape: ModelShape) -> list[tuple[Entry, int]]:
    """A parameter of every size, and how many like it there are: layers are alike, and experts."""
    experts = shape.experts.count if shape.experts else 1
    return [
        (
            entry,
            (1 if entry.layer is None else shape.layers) * (experts if entry.expert == 0 else 1),
        )
        for entry in entries
        if entry.layer in (None, 0) and entry.expert in (None, 0)
    ]


def _kind(entry: Entry) -> str:
    if entry.expert is not None:
        return "expert"
    if entry.layer is not None:
        return "layer"
    return entry.name.split(".")[0].removesuffix("_layer").replace("decoder", "final")
