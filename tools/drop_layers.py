#!/usr/bin/env python3
"""Depth pruning: an HF model folder without some of its layers, as a student to distil.

Example: python tools/drop_layers.py --model teacher --out student --drop 3
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.hf_folder import HFFolder

_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_PER_LAYER = ("layer_types",)


def drop_layers(model: Path, out: Path, drop: Sequence[int]) -> Path:
    """Write ``model`` without the layers ``drop`` (0-based) to ``out``.

    Args:
        model: HF folder with safetensors weights.
        out: folder to make; must not exist.
        drop: layers to leave out.

    Returns:
        ``out``.

    Raises:
        InputError: no such layer, no layer left, or ``out`` exists.
    """
    folder = HFFolder(model)
    layers = folder.config.get("num_hidden_layers", 0)
    wrong = [layer for layer in drop if not 0 <= layer < layers]
    if wrong or len(set(drop)) >= layers:
        raise InputError(
            f"--drop must name some of the layers 0..{layers - 1} and leave one, found "
            f"{', '.join(map(str, drop))}."
        )
    if out.exists():
        raise InputError(f"{out} exists. Remove it or choose another --out.")
    kept = [layer for layer in range(layers) if layer not in drop]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in folder.path.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json", ".bin")):
            shutil.copyfile(path, partial / path.name)
    (partial / "config.json").write_text(json.dumps(_config(folder, kept), indent=2) + "\n")
    tensors = {
        new: folder.read(old) for old in sorted(folder.names) if (new := _new_name(old, kept))
    }
    save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
    partial.rename(out)
    return out


def _new_name(name: str, kept: Sequence[int]) -> str | None:
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, layer, rest = match.groups()
    return f"{prefix}{kept.index(int(layer))}{rest}" if int(layer) in kept else None


def _config(folder: HFFolder, kept: Sequence[int]) -> dict:
    config = folder.config | {"num_hidden_layers": len(kept)}
    for key in _PER_LAYER:
        if isinstance(config.get(key), list):
            config[key] = [config[key][layer] for layer in kept]
    if "max_window_layers" in config:
        config["max_window_layers"] = min(config["max_window_layers"], len(kept))
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="HF folder to prune")
    parser.add_argument("--out", type=Path, required=True, help="HF folder to write")
    parser.add_argument("--drop", required=True, help="0-based layers, comma-separated: 3 or 2,3")
    options = parser.parse_args(arguments)
    try:
        drop = [int(layer) for layer in options.drop.split(",")]
        out = drop_layers(options.model, options.out, drop)
    except ValueError as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
