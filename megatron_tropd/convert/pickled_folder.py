"""pytorch_model.bin folders, for those who ask: only tensors are unpickled, no code runs.

torch's ``weights_only`` loading refuses everything but tensors and plain containers. The files are
mapped, so that only what is read is in memory.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lfs_pointer
from megatron_tropd.convert.hf_folder import (
    INDEX,
    SINGLE,
    HFFolder,
    read_config,
    read_weight_map,
    stored_names,
)

_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickledFolder:
    """Reads like an :class:`HFFolder`.

    Args:
        path: a folder holding config.json and pytorch_model.bin, or its index and files.

    Raises:
        InputError: something is missing or is not a file of tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_config(self.path)
        index = self.path / _INDEX
        weights = read_weight_map(index) if index.is_file() else {}
        self.files = sorted(set(weights.values())) or [_SINGLE]
        self._tensors: dict[str, Tensor] = {}
        for file_name in self.files:
            for name, tensor in _load(self.path / file_name).items():
                if not torch.equal(self._tensors.setdefault(name, tensor), tensor):
                    raise InputError(
                        f"Model folder {self.path} holds {name} twice, in {file_name} and in a "
                        "file before it, and they differ. Export the model again."
                    )
        lost = sorted(set(weights) - set(self._tensors))
        if lost:
            raise InputError(
                f"{index} lists {lost[0]} (and {len(lost) - 1} more), which no file has."
            )
        self._stored_as = stored_names(self.config, self._tensors)
        for name, stored in self._stored_as.items():
            self._tensors[name] = self._tensors.pop(stored)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors in the folder."""
        return frozenset(self._tensors)

    def stored_name(self, name: str) -> str:
        """The name a tensor has in its file."""
        return self._stored_as.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``tensor[start:stop]`` along ``dim`` (0 or 1)."""
        tensor = self._tensors[name]
        return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


def open_source(path: Path, *, allow_pickle: bool) -> HFFolder | PickledFolder:
    """A safetensors folder, or where it has none and the user asked for it, a pickled one."""
    has_safetensors = (path / SINGLE).exists() or (path / INDEX).exists()
    return PickledFolder(path) if allow_pickle and not has_safetensors else HFFolder(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a complete HF folder.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        if pointer := lfs_pointer(path):
            raise InputError(pointer) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a readable file of tensors: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} must hold a dictionary of tensors.")
    return content
