"""What a conversion would do, tensor by tensor, from configs, indices and headers alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import read_json_object
from megatron_tropd.convert.accounting import account, expected_tensors
from megatron_tropd.convert.checkpoint_layout import CheckpointLayout, checkpoint_layout
from megatron_tropd.convert.companions import CONFIG, config_dtype, left_out
from megatron_tropd.convert.families import describe, plan
from megatron_tropd.convert.hf_folder import (
    INDEX,
    read_config,
    read_weight_map,
    stored_names,
)
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.pickled_folder import open_source
from megatron_tropd.convert.safetensors_writer import Spec
from megatron_tropd.convert.to_hf import ToHF, hf_specs, tied_copies
from megatron_tropd.convert.to_megatron import (
    ToMegatron,
    check_sizes,
    check_source,
    padded_vocab,
)


class Line(NamedTuple):
    """One HF tensor of a plan."""

    text: str
    nbytes: int
    megatron: str
    """Name of the Megatron tensor that it is part of."""


@dataclass(frozen=True)
class Preview:
    """A complete plan."""

    model: str
    lines: list[Line]
    notes: list[str]
    warnings: list[str]
    """What the folder has and the output will not have, and code that is not run."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all HF tensors."""
        return sum(line.nbytes for line in self.lines)

    def text(self) -> str:
        """The plan for a person: a line per HF tensor, then the sums."""
        keys = {line.megatron for line in self.lines}
        sums = (
            f"{len(self.lines)} HF tensors, {self.total_bytes:,} bytes <-> {len(keys)} Megatron "
            "tensors"
        )
        tensors = [line.text for line in self.lines]
        return "\n".join([self.model, *tensors, sums, *self.notes, *self.warnings, _DRY])


def preview_to_megatron(job: ToMegatron) -> Preview:
    """Plan HF -> Megatron. Needs config.json, and an index or weight files; reads no weights.

    Raises:
        InputError, ConfigError: the model cannot be converted.
    """
    config = read_config(job.hf)
    notes, dtypes = _source(config, job)
    where = checkpoint_layout(config, padded_vocab(config, job.tensor_parallel))
    notes.append(
        f"vocabulary padded to {where.padded_vocab} rows; {len(where.objects)} empty extra states"
    )
    return Preview(describe(config), _lines(where, dtypes), notes, _warnings(config, job.hf))


def preview_to_hf(job: ToHF) -> Preview:
    """Plan Megatron -> HF, from the metadata of the checkpoint.

    Raises:
        InputError: the checkpoint cannot be converted.
    """
    source = MegatronFolder(job.megatron, job.hf_config)
    specs: Mapping[str, Spec] = hf_specs(source, job.dtype)
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    notes = [f"{new} | copy of {old}" for new, old in tied_copies(source, specs).items()]
    notes += [
        f"{name} | written as {s}" for name in specs if (s := source.stored_name(name)) != name
    ]
    warnings = _warnings(source.config, source.companions)
    return Preview(describe(source.config), _lines(source.layout, dtypes), notes, warnings)


_DRY = "dry run: no weights were read, nothing was written."


def _warnings(config: dict[str, Any], folder: Path) -> list[str]:
    warnings = [f"{name} | not copied" for name in left_out(folder)]
    if config.get("auto_map"):
        warnings.append(
            f"{CONFIG} names code of its own (auto_map), which is not run: the model is taken for "
            f"transformers' {config.get('model_type')}"
        )
    return warnings


def _source(config: dict[str, Any], job: ToMegatron) -> tuple[list[str], Mapping[str, torch.dtype]]:
    """(notes, types) of an HF folder: from its headers, or from its index if that is all."""
    index = job.hf / INDEX
    weights = read_weight_map(index) if index.is_file() else {}
    if weights and not all((job.hf / name).exists() for name in weights.values()):
        return _source_by_index(config, job, weights)
    folder = open_source(job.hf, allow_pickle=job.allow_pickle)
    redundant = check_source(folder, job)
    expected = expected_tensors(plan(config))
    notes = _not_stored(folder.names, expected, redundant)
    notes += [f"{name} | not read: not the model's" for name in folder.unread]
    notes += [f"{n} | stored as {s}" for n in expected if (s := folder.stored_name(n)) != n]
    return notes, {name: job.dtype or folder.dtype(name) for name in expected}


def _source_by_index(
    config: dict[str, Any], job: ToMegatron, weights: Mapping[str, str]
) -> tuple[list[str], Mapping[str, torch.dtype]]:
    index = job.hf / INDEX
    stored = {old: new for new, old in stored_names(config, weights).items()}
    names = [stored.get(name, name) for name in weights]
    entries, redundant = account(config, names, str(index))
    check_sizes(config, job)
    name = config_dtype(config) or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{job.hf / CONFIG} has dtype {name!r}, which torch does not know.")
    expected = expected_tensors(entries)
    planned = sum(map(prod, expected.values())) * dtype.itemsize
    notes = [
        *_not_stored(names, expected, redundant),
        _compare_size(read_json_object(index), planned, weights),
    ]
    return notes, dict.fromkeys(expected, job.dtype or dtype)


def _not_stored(names: Iterable[str], stored: Iterable[str], redundant: list[str]) -> list[str]:
    """What is in the folder and not in the plan; accounting has accepted it."""
    return [
        f"{name} | "
        + ("compared with the embedding" if name in redundant else "left out: computed")
        for name in sorted(set(names) - set(stored))
    ]


def _compare_size(index: dict[str, Any], planned: int, weights: Mapping[str, str]) -> str:
    metadata = index.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    counted = f"{INDEX} lists {len(weights)} tensors"
    if not isinstance(said, int | float):
        return f"{counted} and no total size"
    agrees = "as planned" if said == planned else f"planned from the dtype in {CONFIG}: {planned:,}"
    return f"{counted}, {said:,} bytes: {agrees}"


def _lines(where: CheckpointLayout, dtypes: Mapping[str, torch.dtype]) -> list[Line]:
    stored, lines = where.shapes(), []
    for entry, part in where.pairs():
        position = f"[{', '.join(map(str, part.lead))}]" if part.lead else ""
        for name, shape in entry.operation.hf_shapes().items():
            text = (
                f"{name} {list(shape)} | {entry.operation.summary} | {part.key}{position} of "
                f"{list(stored[part.key])}"
            )
            lines.append(Line(text, prod(shape) * dtypes[name].itemsize, part.key))
    return lines
