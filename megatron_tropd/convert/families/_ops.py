"""Invertible operations between the tensors of an HF folder and one sharded Megatron parameter.

Each operation knows both directions: :meth:`Operation.read` makes one tensor-parallel rank's shard
and reads nothing else from the files; :meth:`Operation.merge` makes the HF tensors from the shards
of all ranks. ``merge`` after ``read`` gives the file's tensors back, bit for bit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Where HF tensors are read from; :class:`megatron_tropd.convert.hf_folder.HFFolder` is one."""

    def read(
        self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> Tensor: ...


class Operation(ABC):
    """How one Megatron parameter is made of HF tensors, and back."""

    summary: ClassVar[str] = "copy"
    """What it does, for a plan that a person reads."""

    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the HF tensors."""

    @abstractmethod
    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the Megatron parameter on each of ``tp_size`` ranks."""

    @abstractmethod
    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        """The shard of rank ``tp_rank``, from slices of the HF tensors."""

    @abstractmethod
    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """The HF tensors, from the shards of all ranks in order."""


@dataclass(frozen=True)
class _OneTensor(Operation):
    """A parameter that is one HF tensor."""

    name: str
    shape: tuple[int, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}


@dataclass(frozen=True)
class Replicated(_OneTensor):
    """The same tensor on every rank (norm weights)."""

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        return self.shape

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        return source.read(self.name)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: shards[0]}


@dataclass(frozen=True)
class Sharded(_OneTensor):
    """Equal parts along ``dim``: 1 for row-parallel weights (their input is sharded)."""

    summary = "copy (column shards)"
    dim: int

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.dim] //= tp_size
        return tuple(shape)

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        size = self.shape[self.dim] // tp_size
        return source.read(self.name, dim=self.dim, start=tp_rank * size, stop=(tp_rank + 1) * size)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.cat(shards, dim=self.dim)}


@dataclass(frozen=True)
class VocabularyRows(_OneTensor):
    """One row per token, padded with zero rows to ``padded_rows``, then in equal parts."""

    summary = "pad rows"
    padded_rows: int

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        return self.padded_rows // tp_size, self.shape[1]

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        size = self.padded_rows // tp_size
        start, stop = (min(edge * size, self.shape[0]) for edge in (tp_rank, tp_rank + 1))
        rows = source.read(self.name, start=start, stop=stop)
        if rows.shape[0] == size:
            return rows
        return torch.nn.functional.pad(rows, (0, 0, 0, size - rows.shape[0]))

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.cat(shards)[: self.shape[0]]}


@dataclass(frozen=True)
class GateUp(Operation):
    """Gate and up projection in one: each rank holds its gate rows, then its up rows."""

    summary = "gate above up"
    gate: str
    up: str
    shape: tuple[int, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.gate: self.shape, self.up: self.shape}

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        return 2 * self.shape[0] // tp_size, *self.shape[1:]

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        size = self.shape[0] // tp_size
        rows = {"start": tp_rank * size, "stop": (tp_rank + 1) * size}
        return torch.cat([source.read(name, **rows) for name in (self.gate, self.up)])

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return {
            self.gate: torch.cat([gate for gate, _ in halves]),
            self.up: torch.cat([up for _, up in halves]),
        }


@dataclass(frozen=True)
class FusedQKV(Operation):
    """Query, key and value projection in one, weight or bias.

    Megatron's rows are grouped by KV head: the query heads that attend to it, then its key, then
    its value. Ranks hold whole groups.
    """

    summary = "interleave q, k, v by KV head"
    query: str
    key: str
    value: str
    heads: int
    kv_heads: int
    head_dim: int
    columns: tuple[int, ...]
    """(hidden size,) for weights, () for biases."""

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        kv = (self.kv_heads * self.head_dim, *self.columns)
        return {
            self.query: (self.heads * self.head_dim, *self.columns),
            self.key: kv,
            self.value: kv,
        }

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        return (self.heads + 2 * self.kv_heads) * self.head_dim // tp_size, *self.columns

    def read(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        groups = self.kv_heads // tp_size
        parts = []
        for name, rows in zip((self.query, self.key, self.value), self._group_rows(), strict=True):
            size = groups * rows
            part = source.read(name, start=tp_rank * size, stop=(tp_rank + 1) * size)
            parts.append(part.unflatten(0, (groups, rows)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: list[Tensor]) -> dict[str, Tensor]:
        rows = self._group_rows()
        grouped = torch.cat(shards).unflatten(0, (self.kv_heads, sum(rows)))
        query, key, value = (part.flatten(0, 1) for part in grouped.split(rows, dim=1))
        return {self.query: query, self.key: key, self.value: value}

    def _group_rows(self) -> list[int]:
        return [self.heads // self.kv_heads * self.head_dim, self.head_dim, self.head_dim]
