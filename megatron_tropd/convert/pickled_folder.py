"""pytorch_model.bin folders, for those who ask: only tensors are unpickled, no code runs.

torch's ``weights_only`` loading refuses everything but tensors and plain containers. The files are
mapped, so that only what is read is in memory.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lfs_pointer
from megatron_tropd.convert.hf_folder import INDEX, SINGLE, HFFolder, read_weight_map
from megatron_tropd.convert.safetensors_file import Stored


class PickledFolder(HFFolder):
    """A folder holding config.json and pytorch_model.bin, or its index and files."""

    single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"

    def _weight_map(self) -> dict[str, str]:
        index = self.path / self.index
        return read_weight_map(index) if index.is_file() else {}

    def _open_file(self, path: Path) -> "_PickledFile":
        return _PickledFile(path)


class _PickledFile:
    """Read like a :class:`megatron_tropd.convert.safetensors_file.SafetensorsFile`."""

    def __init__(self, path: Path) -> None:
        self._mapped = _load(path)
        self.tensors = {
            name: Stored(tensor.dtype, tuple(tensor.shape), 0)
            for name, tensor in self._mapped.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._mapped[name]
        return tensor[start:stop] if tensor.dim() else tensor

    def read_columns(self, name: str, start: int, stop: int | None) -> Tensor:
        return self._mapped[name][:, start:stop]


def open_source(path: Path, *, allow_pickle: bool) -> HFFolder:
    """A safetensors folder, or if it has none and the user asked for it, a pickled one."""
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
