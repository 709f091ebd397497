"""Low-rank adapters (LoRA): which matrices there are, sharded how, and PEFT's names for them.

W [out, in] of a linear layer becomes W + alpha / rank B A with A [rank, in] and B [out, rank]. B is
cut and interleaved as W's rows are, A as W's columns, so an adapter's entries follow from those of
its layer. A fused layer has one A; PEFT, which knows its parts, gets a copy for each.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import LoraConfig
from megatron_tropd.convert.families import (
    Entry,
    FusedQKV,
    GateUp,
    ModelShape,
    Operation,
    Replicated,
    Sharded,
    Source,
    plan,
)

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
"""Layers whose rows are sharded, hence B; those of the others' columns are, hence A."""
OF_EXPERTS = ("linear_fc1", "linear_fc2")
"""Layers that a mixture has in its experts alone."""
_PEFT = "base_model.model."
"""What PEFT puts before the name of a module."""


@dataclass(frozen=True)
class Copies(Operation):
    """One tensor, whole on every rank, under several names: A of a fused layer."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Give every name the one shape."""
        return dict.fromkeys(self.names, self.shape)

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """Give the whole shape: nothing is sharded."""
        return self.shape

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        """Read the tensor under its first name."""
        return source.read(self.names[0])

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """Give every name a copy."""
        # Files of safetensors hold no memory twice.
        return {name: shards[0].clone() for name in self.names}


def target_of(name: str) -> str:
    """The linear layer that a parameter belongs to: "linear_qkv" of "...linear_qkv.weight"."""
    return name.split(".")[-2]


def check_lora(shape: ModelShape, lora: LoraConfig, *, grouped_experts: bool) -> None:
    """Check that a model can have the adapters.

    Args:
        grouped_experts: whether the experts of a mixture are one grouped product.

    Raises:
        ConfigError: it cannot.
    """
    experts = [target for target in lora.targets if target in OF_EXPERTS]
    if shape.experts is not None and experts and grouped_experts:
        raise ConfigError(
            f"model.lora.targets: {' and '.join(experts)} of this mixture are grouped products "
            "over all experts, which get no adapters. Set megatron.model.moe_grouped_gemm = false, "
            "or leave them out of the targets."
        )
    ffn = shape.experts.ffn if shape.experts else shape.ffn
    heads = shape.heads * shape.head_dim
    inner = {"linear_qkv": heads, "linear_proj": heads, "linear_fc1": ffn, "linear_fc2": ffn}
    for target in lora.targets:
        smaller = min(shape.hidden, inner[target])
        if lora.rank > smaller:
            raise ConfigError(
                f"model.lora.rank must be at most {smaller}, the smaller side of the student's "
                f"{target}, found {lora.rank}: an adapter would be larger than the layer. Lower it."
            )


def adapter_plan(hf_config: dict[str, Any], lora: LoraConfig) -> list[Entry]:
    """Every matrix of the adapters in the order of the layers: A, then B.

    An entry is called ``decoder.layers.0.self_attention.linear_qkv.adapter.A``.
    """
    return [
        replace(entry, name=f"{entry.name.removesuffix('weight')}adapter.{matrix}", operation=made)
        for entry in plan(hf_config)
        if entry.name.endswith(".weight") and target_of(entry.name) in lora.targets
        for matrix, made in _matrices(entry.operation, lora.rank).items()
    ]


def peft_config(hf_config: dict[str, Any], lora: LoraConfig, base: str) -> dict[str, Any]:
    """What adapter_config.json of PEFT says.

    Args:
        base: where the model without adapters is.
    """
    entries = adapter_plan(hf_config, lora)
    modules = {name.split(".")[-3] for entry in entries for name in entry.operation.hf_shapes()}
    # PEFT refuses dropout beside experts, whose weights it holds in one parameter.
    has_experts = any(entry.expert is not None for entry in entries)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if has_experts else lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _matrices(layer: Operation, rank: int) -> dict[str, Operation]:
    """A and B beside a linear layer's weight."""
    names = tuple(layer.hf_shapes())
    of_a, of_b = (tuple(_peft_name(name, matrix) for name in names) for matrix in "AB")
    match layer:
        case FusedQKV():
            query, key, value = of_b
            b: Operation = replace(layer, query=query, key=key, value=value, columns=(rank,))
            return {"A": Copies(of_a, (rank, *layer.columns)), "B": b}
        case GateUp():
            b = replace(layer, gate=of_b[0], up=of_b[1], shape=(layer.shape[0], rank))
            return {"A": Copies(of_a, (rank, layer.shape[1])), "B": b}
        case Sharded(dim=1):
            a = replace(layer, name=of_a[0], shape=(rank, layer.shape[1]))
            return {"A": a, "B": Replicated(of_b[0], (layer.shape[0], rank))}
    raise TypeError(f"No adapter is known for a layer made by {type(layer).__name__}.")


def _peft_name(weight: str, matrix: str) -> str:
    return f"{_PEFT}{weight.removesuffix('weight')}lora_{matrix}.weight"


class FirstAdapters:
    """What adapters start from: A as torch's linear layers do, B zero, so that they change nothing.

    Drawn by the seed and the name of the matrix: no layout changes it.
    """

    def __init__(self, entries: list[Entry], seed: int) -> None:
        """Draw nothing yet."""
        self._seed = seed
        self._shapes = {
            name: shape for entry in entries for name, shape in entry.operation.hf_shapes().items()
        }

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Part of a matrix, float32 on the CPU."""
        shape = self._shapes[name]
        stop = shape[dim] if stop is None else stop
        whole = torch.zeros(shape) if name.endswith("lora_B.weight") else self._drawn(name, shape)
        return whole.narrow(dim, start, stop - start)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
