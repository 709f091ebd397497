"""The student as an HF folder, and its adapters as PEFT's."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.convert.accounting import expected_tensors
from megatron_tropd.convert.adapters import peft_config
from megatron_tropd.convert.companions import copy_companions
from megatron_tropd.convert.families import plan
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.publish import publishing
from megatron_tropd.convert.safetensors_writer import SafetensorsWriter, Spec
from megatron_tropd.data.collective import run_everywhere
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.lora import LoraModel
from megatron_tropd.mcore.student import StudentModel

Stream = Iterator[tuple[str, Tensor | None]]
"""Tensors by their names; None on the ranks that do not write."""


def save_hf(
    model: StudentModel,
    source: HFFolder | MegatronFolder,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the model as a complete HF folder: config, tokenizer, weights. Collective.

    The folder appears under its name only when everything is in it; an older one is replaced.

    Args:
        model: what to write.
        source: the folder it was built from; everything but its weights is copied.
        out: the folder to write. On rank 0's file system.
        dtype: of the saved weights; None: the parameters'.
        max_file_bytes: larger models are split into files of at most this size.

    Raises:
        TrainingError: writing failed, on every rank; an older folder is still there.

    Collectives: those of ``exported``, one gather of the outcome on all ranks.
    """
    dtype = dtype or next(model.module.parameters()).dtype
    write = partial(
        write_folder, source=source, out=Path(out), dtype=dtype, max_file_bytes=max_file_bytes
    )
    _written(model.exported(dtype=dtype), write, Path(out), model.layout)


def save_adapter(model: LoraModel, base: str | Path, out: str | Path) -> None:
    """Write the adapters as a folder that PEFT loads: its config, one file of tensors. Collective.

    The folder appears when it is complete; an older one is replaced.

    Args:
        model: whose adapters to write.
        base: HF folder of the frozen weights, which the config names.
        out: the folder to write. On rank 0's file system.

    Raises:
        TrainingError: writing failed, on every rank; an older folder is still there.

    Collectives: those of ``exported_adapters``, one gather of the outcome on all ranks.
    """
    config = peft_config(model.hf_config, model.lora, str(base))
    write = partial(_write_adapter, config=config, out=Path(out))
    _written(model.exported_adapters(), write, Path(out), model.layout)


def _written(stream: Stream, write: Callable[[Stream], None], out: Path, layout: Layout) -> None:
    """Have rank 0 write what all ranks walk, and all of them know what became of it."""

    def here() -> None:
        try:
            if layout.is_main:
                write(stream)
        except (OSError, InputError) as error:
            raise TrainingError(
                f"The export to {out} could not be written: {error}. Make room, then give the "
                "same command again.",
                kind="disk",
            ) from None
        finally:
            for _ in stream:  # making them is collective
                pass

    run_everywhere(here)


def _write_adapter(stream: Stream, config: dict[str, Any], out: Path) -> None:
    tensors = {name: tensor.cpu() for name, tensor in stream if tensor is not None}
    with publishing(out, force=True) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        # Not save_file, whose file nobody but its owner may read.
        content = save(tensors, metadata={"format": "pt"})
        (folder / "adapter_model.safetensors").write_bytes(content)


def write_folder(
    stream: Stream,
    source: HFFolder | MegatronFolder,
    out: Path,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> None:
    """Write HF tensors of one type, and beside them what else ``source`` has."""
    shapes = expected_tensors(plan(source.config))
    specs = {source.stored_name(name): Spec(dtype, shape) for name, shape in shapes.items()}
    with publishing(out, force=True) as folder:
        copy_companions(source.companions, folder)
        config = source.config | {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with SafetensorsWriter(folder, specs, max_file_bytes) as writer:
            for name, tensor in stream:
                if tensor is not None:
                    writer.write(source.stored_name(name), tensor.cpu())
            writer.finish()
