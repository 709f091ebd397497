"""A Hugging Face model folder, read lazily: the config, and any slice of any tensor.

This is the one reading of a folder: which of its files count, which tensors they hold, and what
config.json says. Trainer, converter and planner read through it. A reader with rules of its own
(vLLM, transformers) gets a folder made of it: :mod:`megatron_tropd.convert.linked_folder`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lfs_pointer, read_json_object
from megatron_tropd.base.token_ids import parse_token_ids
from megatron_tropd.convert.companions import CONFIG
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.safetensors_file import SafetensorsFile, Stored

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_COMPARED_BYTES = 64 * 2**20  # of two tensors at a time


class WeightFile(Protocol):
    """A file of tensors."""

    tensors: dict[str, Stored]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``tensor[start:stop]``."""
        ...

    def read_columns(self, name: str, start: int, stop: int | None) -> Tensor:
        """Read ``tensor[:, start:stop]``."""
        ...


class HFFolder:
    """config.json and the safetensors of a model folder. Opening it reads headers only.

    Weights are model.safetensors, or what the index names. Other safetensors files (another
    format of the weights, an adapter) are not the model's: :attr:`unread` lists them.

    Args:
        path: a folder holding config.json and model.safetensors, or model.safetensors.index.json
            and the files it names.
        weights: false: there need be none.

    Raises:
        InputError: something is missing, unreadable or truncated, or the folder holds two models.
    """

    single: ClassVar[str] = SINGLE
    index: ClassVar[str] = INDEX

    def __init__(self, path: str | Path, *, weights: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"Model folder {self.path} does not exist. Give a folder holding config.json, "
                "*.safetensors and the tokenizer, or hf://OWNER/NAME, a model of the hub."
            )
        self.config: dict[str, Any] = read_config(self.path)
        self._open: dict[str, WeightFile] = {}
        self._compared: dict[tuple[str, str], bool] = {}
        there = weights or any((self.path / name).exists() for name in (INDEX, SINGLE))
        self._file_of = self._files_by_tensor() if there else {}
        self._stored_as = stored_names(self.config, self._file_of)
        for name, stored in self._stored_as.items():
            self._file_of[name] = self._file_of.pop(stored)

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

    @property
    def unread(self) -> list[str]:
        """Names of the safetensors files that do not belong to the model."""
        return sorted({p.name for p in self.path.glob("*.safetensors")} - set(self.files))

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._file_of[name]

    def stored_name(self, name: str) -> str:
        """The name a tensor has in its file: see :func:`stored_names`."""
        return self._stored_as.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header."""
        return self._stored(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._stored(name).shape

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read ``tensor[start:stop]`` along ``dim`` (0 or 1), and only that part of the file."""
        shape, file_name = self._stored(name).shape, self._file_of[name]
        stored_name = self.stored_name(name)
        if dim == 0:
            return self._open[file_name].read(stored_name, start, stop)
        if range(shape[dim])[start:stop] == range(shape[dim]):
            return self._open[file_name].read(stored_name)
        return self._open[file_name].read_columns(stored_name, start, stop)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. Reads them, some rows at a time, once."""
        if (one, other) not in self._compared:
            first, second = (
                (self._open[self._file_of[name]], self.stored_name(name)) for name in (one, other)
            )
            self._compared[one, other] = _equal(first, second)
        return self._compared[one, other]

    def _stored(self, name: str) -> Stored:
        if name not in self._file_of:
            raise InputError(f"Tensor {name} is missing in model folder {self.path}.")
        return self._open[self._file_of[name]].tensors[self.stored_name(name)]

    def _header(self, file_name: str) -> dict[str, Stored]:
        if file_name not in self._open:
            self._open[file_name] = self._open_file(self.path / file_name)
        return self._open[file_name].tensors

    def _open_file(self, path: Path) -> WeightFile:
        return _open_safetensors(path)

    def _files_by_tensor(self) -> dict[str, str]:
        weight_map = self._weight_map()
        holders: dict[str, list[str]] = defaultdict(list)
        for file_name in sorted(set(weight_map.values())) or [self.single]:
            for name in self._header(file_name):
                holders[name].append(file_name)
        lost = sorted(name for name, held in weight_map.items() if held not in holders[name])
        if lost:
            raise InputError(
                f"{self.path / self.index} places {lost[0]} (and {len(lost) - 1} more) in "
                f"{weight_map[lost[0]]}, which does not hold it. Download or export the model "
                "again."
            )
        self._check_copies({name: held for name, held in holders.items() if len(held) > 1})
        # A tensor that the index leaves out counts too: transformers reads whole files.
        return {name: held[0] for name, held in holders.items()} | weight_map

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file, by the index; empty: the folder holds model.safetensors alone."""
        index, single = self.path / INDEX, (self.path / SINGLE).exists()
        if not index.exists() and not single:
            raise InputError(self._no_weights())
        weight_map = read_weight_map(index) if index.exists() else {}
        others = sorted(set(weight_map.values()) - {SINGLE})
        some = ", ".join([*others[:2], *(["..."] if others[2:] else [])])
        if single and others:
            raise InputError(
                f"Model folder {self.path} holds two models: {SINGLE}, which transformers loads, "
                f"and {INDEX} with {some}, which vLLM loads. Remove the one that is not meant."
            )
        named, read = self.config.get("transformers_weights"), INDEX if others else SINGLE
        if named not in (None, read):
            raise InputError(
                f"{self.path / CONFIG} has transformers_weights = {named!r}, which transformers "
                f"loads; other readers of the folder load {read}. Remove the key, or that file."
            )
        return weight_map

    def _check_copies(self, copies: Mapping[str, list[str]]) -> None:
        """A tensor may lie in several files, if it is the same in all of them."""
        for name, files in copies.items():
            first = self._open[files[0]]
            for other in files[1:]:
                if not _equal((first, name), (self._open[other], name)):
                    raise InputError(
                        f"Model folder {self.path} holds {name} twice, in {files[0]} and in "
                        f"{other}, and they differ: readers disagree on which counts. Export the "
                        "model again."
                    )

    def _no_weights(self) -> str:
        for name in (SINGLE, INDEX):
            if (self.path / name).is_symlink():
                return (
                    f"{self.path / name} is a link to {(self.path / name).readlink()}, which is "
                    "not there. Download the model again, or copy the file itself."
                )
        hint = "Download or export the model again."
        if others := sorted(p.name for p in self.path.glob("*.bin")):
            hint = (
                f"Found {others[0]}: convert it to safetensors, or give --allow-pickle to tropd "
                "convert to-megatron."
            )
        elif others := sorted(p.name for p in self.path.glob("*.safetensors")):
            hint = f"Found {others[0]}: name it {SINGLE} if it is the whole model. Else: {hint}"
        elif others := sorted(p.name for p in self.path.glob("*.gguf")):
            hint = f"Found {others[0]}: GGUF is not read. Download the model in safetensors."
        return f"Model folder {self.path} holds neither {SINGLE} nor {INDEX}. {hint}"


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Let errors of the block begin with the folder, or the line of a file, that they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def stored_names(hf_config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Tensors that a folder holds under another name than the plan's: plan's name -> its own.

    A tied model has one matrix for the embedding and the output layer. It is stored as the
    embedding, or, by writers that met the output layer first, as ``lm_head.weight``.
    """
    found = set(names)
    if HEAD not in found or EMBEDDING in found or not model_shape(hf_config).tied:
        return {}
    return {EMBEDDING: HEAD}


def _equal(one: tuple[WeightFile, str], other: tuple[WeightFile, str]) -> bool:
    """Whether two stored tensors hold the same numbers, read some rows at a time."""
    (first, name), (second, other_name) = one, other
    shape = first.tensors[name].shape
    if shape != second.tensors[other_name].shape:
        return False
    rows = shape[0] if shape else 1
    step = max(1, _COMPARED_BYTES // max(1, 8 * prod(shape[1:])))
    return all(
        _same(first.read(name, n, n + step), second.read(other_name, n, n + step))
        for n in range(0, rows, step)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype == other.dtype:  # bits, so that NaN equals itself
        return torch.equal(*(t.flatten().view(torch.uint8) for t in (one, other)))
    return torch.equal(one.double(), other.double())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with ``eos_token_id`` in a form that every reader takes.

    Raises:
        InputError: it is missing or holds something else.
    """
    config = read_json_object(folder / CONFIG)
    ids = parse_token_ids(config.get("eos_token_id"), f"{folder / CONFIG}: eos_token_id")
    if "eos_token_id" in config and not isinstance(config["eos_token_id"], int):
        numbers = [token for token in ids if isinstance(token, int)]
        # A token's text means nothing to a model; data.tokenizers looks it up in the file.
        config["eos_token_id"] = numbers or None
    return config


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, from an index.

    Raises:
        InputError: the index is missing or holds something else.
    """
    weight_map = read_json_object(index).get("weight_map")
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
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            lfs_pointer(path)
            or f"{path} is not a readable safetensors file (damaged or truncated): {error}. "
            "Download or export it again."
        ) from None
