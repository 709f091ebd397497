"""One safetensors file, read without mapping it: rows of a tensor go straight into a new tensor.

The safetensors library maps the whole file, writable: reading 1 GiB by ``get_slice``, 32 MiB at a
time, leaves 1.0 GiB resident, and 35 MiB here. A conversion must not need more than its largest
tensors. The header is checked as the library does, with errors that name the tensor.
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
        raise ValueError(
            f"its first 8 bytes say that a header of {length} bytes follows, but the file has "
            f"{size} bytes in all"
        )
    entries = sorted(
        (_entry(name, entry) for name, entry in _header(os.pread(descriptor, length, 8)).items()),
        key=lambda entry: (entry.start, entry.stop),
    )
    tensors, end = {}, 0
    for entry in entries:
        if entry.start != end or entry.stop - entry.start != prod(entry.shape) * entry.size:
            raise ValueError(
                f"the header gives {entry.name} the bytes {entry.start} to {entry.stop}; its type "
                f"and shape, and the tensor before it, ask for {end} to "
                f"{end + prod(entry.shape) * entry.size}"
            )
        place = Stored(entry.dtype, entry.shape, 8 + length + entry.start)
        tensors[entry.name], end = place, entry.stop
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes, found {size}")
    return tensors


@dataclass(frozen=True)
class _Entry:
    """What the header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_each_once)
    except UnicodeDecodeError:
        raise ValueError("the header is no text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"the header must be a JSON object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    return header


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the header names {twice} twice")
    return found


def _entry(name: str, entry: Any) -> _Entry:
    found = entry if isinstance(entry, dict) else {}
    lost = [key for key in ("dtype", "shape", "data_offsets") if key not in found]
    if lost:
        raise ValueError(f"the header says no {' and no '.join(lost)} of tensor {name}")
    dtype = _DTYPES.get(found["dtype"]) if isinstance(found["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name} is of the unknown type {found['dtype']!r}")
    shape, place = found["shape"], found["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", place)):
        if not isinstance(numbers, list) or not all(_counts(number) for number in numbers):
            raise ValueError(f"the {key} of tensor {name} must be whole numbers, found {numbers}")
    if len(place) != 2:
        raise ValueError(f"the data_offsets of tensor {name} must be two numbers, found {place}")
    return _Entry(name, dtype, tuple(shape), *place)


def _counts(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
