"""A Megatron checkpoint as a model folder: its config, its tensors under their HF names."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import read_json_object
from megatron_tropd.convert.accounting import (
    CHECKSUMS,
    check_not_quantised,
    check_shapes,
    differences,
    listed,
)
from megatron_tropd.convert.checkpoint_layout import (
    StoredPart,
    checkpoint_layout,
    is_extra_state,
    is_other_state,
    per_layer_names,
)
from megatron_tropd.convert.companions import CONFIG, SUBFOLDER
from megatron_tropd.convert.families import Entry, model_shape
from megatron_tropd.convert.hf_folder import HFFolder, naming, read_config
from megatron_tropd.convert.torch_dist import METADATA, TorchDistReader

TRACKER = "latest_checkpointed_iteration.txt"
_EMBEDDING = "embedding.word_embeddings.weight"


class NoCompanions(InputError):
    """A checkpoint carries no config.json; whoever has an option for it adds its name."""


class MegatronFolder:
    """A ``torch_dist`` checkpoint of a supported model. Opening it reads the metadata only.

    Args:
        path: what Megatron's ``--load`` takes (holds latest_checkpointed_iteration.txt), or one
            checkpoint (holds .metadata), as Megatron or our trainer wrote it.
        hf: HF folder of the architecture, for checkpoints that carry none; None: the checkpoint's
            own, or the one the run that wrote it was started from.

    Raises:
        InputError: it is no such checkpoint, its architecture is unknown, or its tensors are not
            those of the architecture: lists what is missing or left over.
    """

    def __init__(self, path: str | Path, hf: str | Path | None = None) -> None:
        self.path = Path(path)
        self.checkpoint = checkpoint_folder(self.path)
        self.companions = Path(hf) if hf else _own_companions(self.path, self.checkpoint)
        """Folder of config.json, tokenizer, chat template and generation config."""
        self.config: dict[str, Any] = read_config(self.companions)
        self.reader = TorchDistReader(self.checkpoint)
        where = f"Megatron checkpoint {self.checkpoint}"
        check_not_quantised(self.config, (), where)
        with naming(where):
            model_shape(self.config)
        rows = self._rows(where)
        self.layout = checkpoint_layout(self.config, rows)
        self._places = self._resolve(where)
        self.records, self._stored_as = _read_checksums(self.checkpoint / CHECKSUMS)
        """Type, shape and checksum of HF tensors, where a conversion made the checkpoint."""

    def stored_name(self, name: str) -> str:
        """The name an HF tensor had in the folder that the checkpoint was converted from."""
        return self._stored_as.get(name, name)

    @property
    def padded_vocab(self) -> int:
        """Rows of the stored embeddings."""
        return self.layout.padded_vocab

    @property
    def per_layer(self) -> bool:
        """Whether every layer is stored under a name of its own, not as part of a stack."""
        return any(name[0].startswith("decoder.layers.0.") for name in self._places.values())

    @property
    def entries(self) -> list[Entry]:
        """The plan, for the stored padding."""
        return self.layout.entries

    def dtype(self, entry: Entry) -> torch.dtype:
        """Type in which an entry is stored."""
        return self.reader.dtype(self._places[_identity(entry)][0])

    def nbytes(self, entry: Entry) -> int:
        """Bytes of an entry as stored."""
        return prod(entry.operation.shard_shape(1)) * self.dtype(entry).itemsize

    def check_data(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of the model's tensors, or of a share of them.

        Raises:
            InputError: a file is damaged.
        """
        self.reader.check({key for key, _ in self._places.values()}, part=part, parts=parts)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The HF tensors of an entry.

        Raises:
            InputError: a file is damaged.
        """
        key, lead = self._places[_identity(entry)]
        return entry.operation.merge([self.reader.read(key, lead)])

    def _rows(self, where: str) -> int:
        if _EMBEDDING not in self.reader.names:
            raise InputError(
                f"{where} holds no {_EMBEDDING}: it is not a language model of Megatron-Core's "
                f"GPTModel. It holds {listed(sorted(self.reader.names)[:5])}."
            )
        rows = self.reader.shape(_EMBEDDING)[0]
        vocab = model_shape(self.config).vocab
        if rows < vocab:
            raise InputError(
                f"{where} has {rows} embedding rows, config.json says vocab_size = {vocab}. They "
                "do not belong together."
            )
        return rows

    def _resolve(self, where: str) -> dict[tuple, tuple[str, tuple[int, ...]]]:
        """Find every entry; everything else must be known."""
        names, found, missing = self.reader.names, {}, []
        expected: dict[str, tuple[int, ...]] = {}
        for entry, place in self.layout.pairs():
            options = self._options(place)
            name = next((option for option in options if option[0] in names), None)
            if name is None:
                missing.append(place.key)
                continue
            found[_identity(entry)] = name
            leads = place.leads if name[1] else ()
            expected[name[0]] = (*leads, *entry.operation.shard_shape(1))
        known = expected.keys() | self.layout.copies.keys()
        surplus = [name for name in names - known if not is_other_state(name)]
        surplus += [
            name
            for name in self.reader.objects
            if not (is_other_state(name) or is_extra_state(name))
        ]
        if problems := differences(sorted(set(missing)), sorted(surplus)):
            raise InputError(
                f"{where} {problems}. It is not the model of {self.companions / CONFIG}."
            )
        check_shapes(expected, {n: self.reader.shape(n) for n in expected}, where, self.config)
        return found

    def _options(self, place: StoredPart) -> list[tuple[str, tuple[int, ...]]]:
        """Where a part may lie: in the stacked tensor, under its other name, or on its own."""
        other = {old: new for new, old in self.layout.copies.items()}.get(place.key)
        stacked = [(place.key, place.lead)] + ([(other, place.lead)] if other else [])
        return stacked + [(name, ()) for name in per_layer_names(place)]


def is_megatron_folder(path: str | Path) -> bool:
    """Whether a folder is a Megatron checkpoint, told by its files."""
    path = Path(path)
    return (path / TRACKER).is_file() or (path / METADATA).is_file()


def open_model(path: str | Path, *, weights: bool = True) -> HFFolder | MegatronFolder:
    """Open a model folder of either kind.

    Args:
        weights: false: an HF folder need have none.

    Raises:
        InputError: it is neither, or not whole.
    """
    if is_megatron_folder(path):
        return MegatronFolder(path)
    return HFFolder(path, weights=weights)


def companions_of(path: str | Path) -> Path:
    """Where config.json and the tokenizer of a model folder lie.

    Raises:
        InputError: a Megatron checkpoint that carries none.
    """
    if not is_megatron_folder(path):
        return Path(path)
    return _own_companions(Path(path), checkpoint_folder(Path(path)))


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds ``.metadata``.

    Raises:
        InputError: there is none.
    """
    if (path / METADATA).is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise InputError(
            f"{path} is no Megatron checkpoint: it holds neither {TRACKER} nor {METADATA}. Give "
            "what Megatron's --load takes, or one iteration's folder."
        )
    iteration = tracker.read_text().strip()
    name = f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
    if name != "release" and not name.startswith("iter_"):
        raise InputError(f'{tracker} must say "release" or an iteration, found {iteration!r}.')
    if not (path / name / METADATA).is_file():
        raise InputError(
            f"{tracker} names {name}, but {path / name} is no torch_dist checkpoint (other "
            "formats are not read). Load it with Megatron and save it with --ckpt-format "
            "torch_dist."
        )
    return path / name


def _own_companions(path: Path, checkpoint: Path) -> Path:
    for folder in (path / SUBFOLDER, checkpoint.parent / SUBFOLDER):
        if (folder / CONFIG).is_file():
            return folder
    # A run of ours keeps its checkpoints in <run>/checkpoints and its settings in <run>.
    settings = checkpoint.parent.parent / CONFIG
    if settings.is_file():
        model = read_json_object(settings).get("model")
        if isinstance(model, dict) and "student" in model:
            student = companions_of(model["student"])
            if (student / CONFIG).is_file():
                return student
            raise NoCompanions(
                f"The run of {path} was started from {model['student']}, which holds no {CONFIG} "
                f"now. {_remedy(checkpoint)}"
            )
    raise NoCompanions(
        f"{path} carries no config.json (looked in {path / SUBFOLDER}). {_remedy(checkpoint)}"
    )


def _remedy(checkpoint: Path) -> str:
    return (
        "Copy config.json and the tokenizer files of the model's HF folder into "
        f"{checkpoint.parent / SUBFOLDER}."
    )


def _read_checksums(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(records, names that tensors had) of a converted checkpoint; of any other: none."""
    content = read_json_object(path) if path.is_file() else {}
    records, stored = content.get("tensors", {}), content.get("stored_as", {})
    whole = isinstance(records, dict) and isinstance(stored, dict)
    fields = ("dtype", "shape", "crc32")
    if not whole or not all(
        isinstance(r, dict) and set(fields) <= r.keys() for r in records.values()
    ):
        raise InputError(
            f"{path} is damaged: it must hold {', '.join(fields)} of every tensor. Convert the "
            "model again, or remove the file to go without its checksums."
        )
    return records, stored


def _identity(entry: Entry) -> tuple:
    return entry.name, entry.layer, entry.expert
