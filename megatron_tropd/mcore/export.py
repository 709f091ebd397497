"""The student as an HF folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.convert.accounting import expected_tensors
from megatron_tropd.convert.companions import copy_companions
from megatron_tropd.convert.families import plan
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.publish import publishing
from megatron_tropd.convert.safetensors_writer import SafetensorsWriter, Spec
from megatron_tropd.data.collective import run_everywhere
from megatron_tropd.mcore.student import StudentModel


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
    stream = model.exported(dtype=dtype)

    def write() -> None:
        try:
            if model.layout.is_main:
                write_folder(stream, source, Path(out), dtype, max_file_bytes)
        except (OSError, InputError) as error:
            raise TrainingError(
                f"The export to {out} could not be written: {error}. Make room, then give the "
                "same command again.",
                kind="disk",
            ) from None
        finally:
            for _ in stream:  # making them is collective
                pass

    run_everywhere(write)


def write_folder(
    stream: Iterator[tuple[str, Tensor | None]],
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
