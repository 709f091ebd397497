"""What belongs to a model besides its weights: config, tokenizer, chat template, generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

SUBFOLDER = "hf"
"""Folder inside a Megatron folder that holds them."""
CONFIG = "config.json"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".index.json")
_CODE = (".py", ".pyc", ".so")
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy every file of a model folder that is neither weights nor code.

    Args:
        source: HF folder.
        out: existing folder.

    Returns:
        Names of the files, sorted.
    """
    names = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file() and not path.name.startswith(".")
        if not path.name.endswith(_WEIGHTS + _CODE)
    ]
    for name in names:
        shutil.copyfile(source / name, out / name)
    if (source / _TEMPLATES).is_dir():
        _copy_folder(source / _TEMPLATES, out / _TEMPLATES)
        names.append(_TEMPLATES)
    return names


def _copy_folder(source: Path, out: Path) -> None:
    """Contents, not modes: a read-only source must not make an output that cannot be removed."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def config_dtype(hf_config: dict[str, Any]) -> str | None:
    """The type config.json gives its weights, "bfloat16"; None where it does not say."""
    value = hf_config.get("dtype", hf_config.get("torch_dtype"))
    return str(value).removeprefix("torch.") if value else None


def set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let config.json name ``dtype``; a config that does already keeps its bytes."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    name = str(dtype).removeprefix("torch.")
    if config_dtype(config) == name:
        return
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    path.write_text(json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n")
