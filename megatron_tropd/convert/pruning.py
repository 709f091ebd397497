"""Depth pruning: an HF folder without some of its layers, as the student of its own teacher."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.companions import CONFIG, copy_companions
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.publish import publishing
from megatron_tropd.convert.safetensors_writer import SafetensorsWriter, Spec

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def drop_layers(
    model: str | Path, out: str | Path, layers: Sequence[int], *, max_file_bytes: int = 2**31
) -> None:
    """Write an HF folder that lacks ``layers``; the others keep their weights and their order.

    The folder appears whole or not at all.

    Args:
        model: HF folder, safetensors, layers named ``model.layers.<n>.``.
        layers: numbers of the layers to leave out, from 0.
        max_file_bytes: larger models are split into files of at most this size.

    Raises:
        InputError: the model is not usable, ``out`` exists, or ``layers`` are not some, but not
            all, of the model's.
    """
    source, out = HFFolder(model), Path(out)
    if out.exists():
        raise InputError(f"{out} exists already. Remove it or name another folder.")
    kept = _kept_layers(source, layers)
    names = _kept_tensors(source, kept)
    specs = {new: Spec(source.dtype(old), source.shape(old)) for new, old in names.items()}
    with publishing(out, force=False) as folder:
        copy_companions(source.path, folder)
        config = json.dumps(_pruned_config(source.config, kept), indent=2)
        (folder / CONFIG).write_text(config + "\n")
        with SafetensorsWriter(folder, specs, max_file_bytes) as writer:
            for new, old in names.items():
                writer.write(new, source.read(old))
            writer.finish()


def _kept_layers(source: HFFolder, layers: Sequence[int]) -> list[int]:
    """Old numbers of the layers that stay, in order."""
    count = source.config.get("num_hidden_layers")
    if not isinstance(count, int):
        raise InputError(f"{source.path / CONFIG} has no num_hidden_layers.")
    if unknown := sorted(set(layers) - set(range(count))):
        raise InputError(
            f"{source.path} has the layers 0..{count - 1}, found {unknown[0]} among those to drop."
        )
    kept = [layer for layer in range(count) if layer not in layers]
    if not kept or len(kept) == count:
        raise InputError(
            f"Expected some, but not all, of the {count} layers to drop, found {sorted(layers)}."
        )
    return kept


def _pruned_config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    pruned = config | {"num_hidden_layers": len(kept)}
    if config.get("layer_types"):
        pruned["layer_types"] = [config["layer_types"][layer] for layer in kept]
    if "max_window_layers" in config:  # the first so many layers attend to everything
        pruned["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in kept)
    return pruned


def _kept_tensors(source: HFFolder, kept: Sequence[int]) -> dict[str, str]:
    """New name -> name in the source."""
    number = {old: new for new, old in enumerate(kept)}
    names = {}
    for name in sorted(source.names):
        match = _LAYER.match(name)
        if match is None:
            names[name] = name
        elif (old := int(match[1])) in number:
            names[f"model.layers.{number[old]}.{name[match.end() :]}"] = name
    return names
