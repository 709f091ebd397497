"""Safetensors written tensor by tensor: the headers come from the plan, the bytes in any order.

huggingface_hub assigns the tensors to files. The library's ``save_file`` holds all tensors of a
file at once (1.0 GiB more for a file of 1 GiB), a conversion no more than its largest ones.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import _TYPES
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.hf_folder import INDEX

_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What a safetensors header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """model.safetensors, or numbered files and their index, of tensors known beforehand.

    Every tensor has its place from the start: they may be written in any order and from any
    thread, and none is kept.

    Args:
        specs: name -> type and shape, in the order of the files.
        max_file_bytes: the tensors of a file together take at most this, single ones aside.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], max_file_bytes: int) -> None:
        self._specs = dict(specs)
        self._missing = set(specs)
        self._files: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}
        files = split_state_dict_into_shards_factory(
            self._specs,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_file_bytes,
        )
        for name, tensors in files.filename_to_tensors.items():
            self._begin(folder / name, tensors)
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        for descriptor in self._files:
            os.close(descriptor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place.

        Raises:
            InputError: it is not of the type and shape announced.
            OSError: the disk is full, or the like.
        """
        spec = self._specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise InputError(
                f"{name} must be {spec.dtype} {list(spec.shape)}, found {tensor.dtype} "
                f"{list(tensor.shape)}."
            )
        descriptor, offset = self._places[name]
        data = tensor_bytes(tensor)
        while data.nbytes:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
        self._missing.discard(name)

    def finish(self) -> None:
        """Check that every tensor came, and put the files on disk."""
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
        for descriptor in self._files:
            os.fsync(descriptor)

    def _begin(self, path: Path, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            spec, start = self._specs[name], end
            end += spec.nbytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files.append(descriptor)
        start = os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.truncate(descriptor, start + end)
        for name in names:
            self._places[name] = (descriptor, start + header[name]["data_offsets"][0])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())
