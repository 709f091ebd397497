"""One safetensors file, read without mapping it: rows of a tensor go straight into a new tensor.

The safetensors library checks the header. But it maps the whole file, writable: reading 1 GiB by
``get_slice``, 32 MiB at a time, leaves 1.0 GiB resident, and 35 MiB here. A conversion must not
need more than its largest tensors.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

_DTYPES: dict[str, Any] = dict(_TYPES)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which its data begin."""


class SafetensorsFile:
    """Header and tensors of one file.

    Raises:
        ValueError: the header is not one, or does not fit the file's size.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            with safe_open(str(path), framework="pt"):
                self.tensors = _read_header(self._file.fileno())
        except SafetensorError as error:
            raise ValueError(str(error)) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``tensor[start:stop]`` along the first dimension."""
        stored = self.tensors[name]
        if not stored.shape:
            return self._bytes(stored, (), 0)
        rows = range(stored.shape[0])[start:stop]
        row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
        return self._bytes(stored, (len(rows), *stored.shape[1:]), rows.start * row_bytes)

    def read_columns(self, name: str, start: int, stop: int | None) -> Tensor:
        """Read ``tensor[:, start:stop]``; here the file is mapped."""
        return self._mapped.get_slice(name)[:, start:stop]

    @cached_property
    def _mapped(self) -> Any:
        return safe_open(str(self.path), framework="pt")

    def _bytes(self, stored: Stored, shape: tuple[int, ...], skip: int) -> Tensor:
        tensor = torch.empty(shape, dtype=stored.dtype)
        room = memoryview(tensor.flatten().view(torch.uint8).numpy())
        offset = stored.start + skip
        while room.nbytes:
            count = os.preadv(self._file.fileno(), [room], offset)
            if not count:
                raise OSError(f"{self.path} ended early: it was changed while it was read")
            room, offset = room[count:], offset + count
        return tensor


def _read_header(descriptor: int) -> dict[str, Stored]:
    """Where each tensor of a file lies, whose header the library has checked."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    header = json.loads(os.pread(descriptor, length, 8))
    header.pop("__metadata__", None)
    if unknown := {name: e["dtype"] for name, e in header.items() if e["dtype"] not in _DTYPES}:
        raise ValueError(f"torch has no type for these tensors: {unknown}")
    return {
        name: Stored(_DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }
