"""What belongs to a model besides its weights: config, tokenizer, chat template, generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

SUBFOLDER = "hf"
"""Folder inside a Megatron folder that holds them."""
CONFIG = "config.json"

_KINDS = (".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".md")
"""Configs, vocabularies and merges, SentencePiece models, chat templates, model cards."""
_PAPERS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "README")
_ADAPTER = "adapter_config.json"
"""Not copied: transformers would take the copy for an adapter of a model."""
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy the files of a model folder that are known to belong to it beside its weights."""
    names = [path.name for path in _files(source) if _is_companion(path.name)]
    for name in names:
        shutil.copyfile(source / name, out / name)
    if (source / _TEMPLATES).is_dir():
        _copy_folder(source / _TEMPLATES, out / _TEMPLATES)
        names.append(_TEMPLATES)
    return names


def left_out(source: Path) -> list[str]:
    """Names of the files that :func:`copy_companions` leaves behind, weights apart, sorted.

    Code, pickles, other formats of the weights, and whatever else is not known.
    """
    names = [path.name for path in _files(source)]
    return [name for name in names if not _is_companion(name) and not _is_weights(name)]


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def _is_companion(name: str) -> bool:
    if name == _ADAPTER:
        return False
    known = name.endswith(_KINDS) or name.split(".")[0].upper() in _PAPERS
    return known and not _is_weights(name)


def _is_weights(name: str) -> bool:
    pickled = name.startswith("pytorch_model") and name.endswith(".bin")
    return pickled or name.endswith((".safetensors", ".index.json"))


def _copy_folder(source: Path, out: Path) -> None:
    """Contents, not modes: a read-only source must not make an output that cannot be removed."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def config_dtype(hf_config: dict[str, Any]) -> str | None:
    """The type config.json gives its weights, "bfloat16"; None if it does not say."""
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
