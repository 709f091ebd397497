"""One safetensors file, read without mapping it: rows of a tensor go straight into a new tensor.

The safetensors library maps a file writable, which counts as private memory as large as the file;
a conversion must not need more than its largest tensors. The header is checked as the library
does.
"""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _TYPES
from torch import Tensor

_DTYPES: dict[str, Any] = dict(_TYPES)
_MAX_HEADER = 10**8  # the library's own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which its data begin."""


class SafetensorsFile:
    """Header and tensors of one file.

    Args:
        path: the file.

    Raises:
        ValueError: the header is not one, or does not fit the file's size.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self.tensors = _parse(self._file.fileno())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``tensor[start:stop]`` along the first dimension."""
        stored = self.tensors[name]
        if not stored.shape:
            return self._bytes(stored, (), 0)
        rows = range(stored.shape[0])[start:stop]
        row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
        return self._bytes(stored, (len(rows), *stored.shape[1:]), rows.start * row_bytes)

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


def _parse(descriptor: int) -> dict[str, Stored]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError(f"the header cannot be {length} bytes in a file of {size}")
    header = json.loads(os.pread(descriptor, length, 8))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise ValueError(f"{name} is of the unknown type {entry['dtype']}")
        start, stop = entry["data_offsets"]
        if start != end or stop - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"the place of {name} does not fit its shape")
        tensors[name], end = Stored(dtype, shape, 8 + length + start), stop
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes, found {size}")
    return tensors
