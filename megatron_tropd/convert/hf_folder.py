"""A Hugging Face model folder, read lazily: the config, and any slice of any tensor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_tropd.convert.safetensors_file import SafetensorsFile, Stored
from megatron_tropd.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFFolder:
    """config.json and the safetensors of a model folder. Opening it reads headers only.

    Args:
        path: a folder holding config.json and model.safetensors, or model.safetensors.index.json
            and the files it names.

    Raises:
        InputError: something is missing, unreadable or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"Model folder {self.path} does not exist. Give a folder holding config.json, "
                "*.safetensors and the tokenizer."
            )
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._open: dict[str, SafetensorsFile] = {}
        self._mapped: dict[str, Any] = {}
        self._file_of = self._index()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors in the folder."""
        return frozenset(self._file_of)

    @property
    def companions(self) -> Path:
        """Folder of config.json, tokenizer, chat template and generation config."""
        return self.path

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted(set(self._file_of.values()))

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header."""
        return self._stored(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._stored(name).shape

    def read(
        self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Read ``tensor[start:stop]`` along ``dim`` (0 or 1), and only that part of the file."""
        shape, file_name = self._stored(name).shape, self._file_of[name]
        if dim == 0:
            return self._open[file_name].read(name, start, stop)
        if range(shape[dim])[start:stop] == range(shape[dim]):
            return self._open[file_name].read(name)
        if file_name not in self._mapped:
            self._mapped[file_name] = safe_open(str(self.path / file_name), framework="pt")
        return self._mapped[file_name].get_slice(name)[:, start:stop]

    def _stored(self, name: str) -> Stored:
        if name not in self._file_of:
            raise InputError(f"Tensor {name} is missing in model folder {self.path}.")
        return self._open[self._file_of[name]].tensors[name]

    def _header(self, file_name: str) -> dict[str, Stored]:
        if file_name not in self._open:
            self._open[file_name] = _open_safetensors(self.path / file_name)
        return self._open[file_name].tensors

    def _index(self) -> dict[str, str]:
        index = self.path / INDEX
        if not index.exists():
            if not (self.path / SINGLE).exists():
                raise InputError(self._no_weights())
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        weight_map = read_weight_map(index)
        unlisted: dict[str, str] = {}
        for file_name in sorted(set(weight_map.values())):
            held = self._header(file_name).keys()
            unlisted |= dict.fromkeys(held, file_name)
            lost = sorted(n for n, f in weight_map.items() if f == file_name and n not in held)
            if lost:
                raise InputError(
                    f"{index} places {lost[0]} (and {len(lost) - 1} more) in {file_name}, which "
                    "does not hold it. Download or export the model again."
                )
        # A tensor that the index leaves out counts too: transformers reads whole files.
        return unlisted | weight_map

    def _no_weights(self) -> str:
        others = sorted(p.name for p in self.path.glob("*.bin"))
        hint = (
            f"Found {others[0]}: convert it to safetensors, or with tropd convert --allow-pickle."
            if others
            else "Download or export the model again."
        )
        return f"Model folder {self.path} holds neither {SINGLE} nor {INDEX}. {hint}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a complete HF folder.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, from an index.

    Raises:
        InputError: the index is missing or holds something else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map. Download or export the model again.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise InputError(
                f"{index} must name files of its own folder, found {file_name!r} for {name}. "
                "Download or export the model again."
            )
    return weight_map


def _open_safetensors(path: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a complete HF folder.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file (truncated download?): {error}"
        ) from None
