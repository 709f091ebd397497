"""Megatron ``torch_dist`` checkpoint to HF folder, bit for bit, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.accounting import CHECKSUMS, check_types, checksum, converted
from megatron_tropd.convert.budget import Budget
from megatron_tropd.convert.companions import copy_companions, set_config_dtype
from megatron_tropd.convert.families import Entry
from megatron_tropd.convert.hf_folder import EMBEDDING, HEAD
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.publish import claim, publishing
from megatron_tropd.convert.safetensors_writer import SafetensorsWriter, Spec
from megatron_tropd.convert.to_megatron import TensorDone

_TIED = {HEAD: EMBEDDING}


@dataclass(frozen=True)
class ToHF:
    """How a Megatron checkpoint becomes an HF folder."""

    megatron: Path
    hf: Path
    dtype: torch.dtype | None = None
    """Type of the written weights; None: as they are stored, bit for bit."""
    max_shard_bytes: int = 5 * 10**9
    """Larger models are split into files of at most this size."""
    hf_config: Path | None = None
    """HF folder of architecture and tokenizer, for checkpoints that carry none."""
    force: bool = False
    workers: int = 2
    """Threads; together they hold at most two of the largest tensors, twice."""


def megatron_to_hf(job: ToHF, progress: TensorDone = lambda name, size: None) -> None:
    """Convert; the output appears whole or not at all.

    Raises:
        InputError: the checkpoint cannot be converted or is damaged, or the output exists.
        OSError: the output could not be written; nothing of it is left.
    """
    claim(job.hf, force=job.force, inputs=[job.megatron])
    source = MegatronFolder(job.megatron, job.hf_config)
    claim(job.hf, force=job.force, inputs=[source.companions])
    specs = hf_specs(source, job.dtype)
    records = source.records
    extra = tied_copies(source, specs)
    specs |= {name: specs[original] for name, original in extra.items()}
    with publishing(job.hf, force=job.force) as folder:
        copy_companions(source.companions, folder)
        dtypes = {spec.dtype for spec in specs.values()}
        if len(dtypes) == 1:
            set_config_dtype(folder, dtypes.pop())
        stored = {source.stored_name(name): spec for name, spec in specs.items()}
        with SafetensorsWriter(folder, stored, job.max_shard_bytes) as writer:
            budget = Budget(max(map(source.nbytes, source.entries)))

            def convert(entry: Entry) -> None:
                with budget.holding(source.nbytes(entry)):
                    for name, tensor in _hf_tensors(source, entry, extra):
                        _compare(name, tensor, records)
                        tensor = converted(name, tensor, specs[name].dtype)
                        writer.write(source.stored_name(name), tensor)
                        progress(name, tensor.nbytes)

            _in_threads(convert, source.entries, job.workers)
            writer.finish()


def hf_specs(source: MegatronFolder, dtype: torch.dtype | None) -> dict[str, Spec]:
    """Type and shape of every HF tensor, in the order of the layers.

    Raises:
        InputError: weights that are not floating point.
    """
    types = {entry.name: source.dtype(entry) for entry in source.entries}
    check_types(types, f"Megatron checkpoint {source.checkpoint}")
    return {
        name: Spec(dtype or types[entry.name], shape)
        for entry in source.entries
        for name, shape in entry.operation.hf_shapes().items()
    }


def tied_copies(source: MegatronFolder, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Output layers that the converted folder held though they were tied: name -> original."""
    records = source.records
    return {
        name: original
        for name, original in _TIED.items()
        if name in records and name not in specs and original in specs
    }


def _hf_tensors(
    source: MegatronFolder, entry: Entry, extra: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    tensors = source.read(entry)
    for name in list(tensors):
        tensor = tensors.pop(name)
        yield name, tensor
        for again in (new for new, original in extra.items() if original == name):
            yield again, tensor


def _compare(name: str, tensor: Tensor, records: Mapping[str, Any]) -> None:
    record = records.get(name)
    if record is None or record["dtype"] != str(tensor.dtype).removeprefix("torch."):
        return
    if checksum(tensor) != record["crc32"]:
        raise InputError(
            f"{name} is not what was converted: its checksum differs from the one in {CHECKSUMS}. "
            "The checkpoint is damaged; convert it again."
        )


def _in_threads(work: Callable[[Entry], None], items: Iterable[Entry], workers: int) -> None:
    """Run ``work`` on every item; the first error ends it."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
