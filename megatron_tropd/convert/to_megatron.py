"""HF folder to Megatron ``torch_dist`` checkpoint, bit for bit, one tensor at a time."""

import json
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.accounting import (
    CHECKSUMS,
    check_digests,
    checksum,
    converted,
    known_digests,
)
from megatron_tropd.convert.checkpoint_layout import CheckpointLayout, checkpoint_layout
from megatron_tropd.convert.checks import check_headers, check_parallel, not_tied
from megatron_tropd.convert.companions import (
    SUBFOLDER,
    copy_companions,
    set_config_dtype,
)
from megatron_tropd.convert.families import Entry, ModelShape, model_shape, rope_parameters
from megatron_tropd.convert.hf_folder import EMBEDDING, HFFolder
from megatron_tropd.convert.megatron_folder import TRACKER
from megatron_tropd.convert.pickled_folder import open_source
from megatron_tropd.convert.publish import claim, publishing
from megatron_tropd.convert.torch_dist import Part, write_checkpoint

RELEASE = "release"
_VOCAB_MULTIPLE = 128  # Megatron's --make-vocab-size-divisible-by

TensorDone = Callable[[str, int], None]
"""Called with the name of a finished tensor and its bytes; from any thread."""


@dataclass(frozen=True)
class ToMegatron:
    """How an HF folder becomes a Megatron checkpoint."""

    hf: Path
    megatron: Path
    dtype: torch.dtype | None = None
    """Type of the stored weights; None: as they are, bit for bit."""
    tensor_parallel: int = 1
    """Only pads the vocabulary (to 128 x this) and is noted: the checkpoint loads at any size."""
    pipeline_parallel: int = 1
    """Only noted, for Megatron's --use-mp-args-from-checkpoint-args."""
    force: bool = False
    allow_pickle: bool = False
    """Read pytorch_model.bin if there are no safetensors; tensors only, no code runs."""
    check_downloads: bool = True
    """Hash weight files whose download left their SHA-256 beside them."""
    workers: int = 2
    """Threads; together they hold at most two of the largest tensors, twice."""


def hf_to_megatron(job: ToMegatron, progress: TensorDone = lambda name, size: None) -> None:
    """Convert; the output appears whole or not at all.

    Raises:
        InputError, ConfigError: the model cannot be converted, or the output exists.
        OSError: the output could not be written; nothing of it is left.
    """
    claim(job.megatron, force=job.force, inputs=[job.hf])
    source = open_source(job.hf, allow_pickle=job.allow_pickle)
    redundant = check_source(source, job)
    padded = padded_vocab(source.config, job.tensor_parallel)
    where = checkpoint_layout(source.config, padded)
    reading = _Checked(source, job.dtype)
    if redundant:
        _check_tied(reading, redundant)
    parts = _parts(where, reading, progress)
    with publishing(job.megatron, force=job.force) as folder:
        (folder / RELEASE).mkdir()
        common = {
            "args": _arguments(source.config, padded, job, parts[0].dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False},
        }
        write_checkpoint(
            folder / RELEASE, parts, where.objects, common, workers=max(1, job.workers)
        )
        (folder / SUBFOLDER).mkdir()
        copy_companions(source.path, folder / SUBFOLDER)
        if job.dtype is not None:
            set_config_dtype(folder / SUBFOLDER, job.dtype)
        _write_checksums(folder / RELEASE, reading)
        (folder / TRACKER).write_text("release")


def check_source(source: HFFolder, job: ToMegatron) -> list[str]:
    """Everything that can be wrong before a byte is written, from headers (and known digests).

    Returns:
        Redundant tensors of the folder: the output layer of a tied model.

    Raises:
        InputError, ConfigError: says what does not fit.
    """
    entries, redundant = check_headers(source)
    check_sizes(source.config, job)
    if job.dtype is None:
        _check_one_type(entries, source)
    if job.check_downloads:
        check_digests(source.path, known_digests(source.path, source.files))
    return redundant


def check_sizes(hf_config: dict[str, Any], job: ToMegatron) -> None:
    """The sizes are only noted, but a checkpoint must not note what nobody can load.

    Raises:
        ConfigError: a size does not divide.
    """
    parallel = ParallelConfig(
        tensor=job.tensor_parallel,
        pipeline=job.pipeline_parallel,
        sequence_parallel=job.tensor_parallel > 1,
    )
    try:
        check_parallel(hf_config, parallel, who="model")
    except ConfigError as error:
        raise ConfigError(
            f"--tensor-parallel or --pipeline-parallel does not fit: {error} Without the "
            "option the checkpoint loads at any size that does."
        ) from None


def padded_vocab(hf_config: dict[str, Any], tensor_parallel: int) -> int:
    """Rows of the stored embeddings: what Megatron pads the vocabulary to."""
    multiple = _VOCAB_MULTIPLE * tensor_parallel
    return -(-model_shape(hf_config).vocab // multiple) * multiple


class _Checked:
    """Reads whole HF tensors, converts them if asked, and keeps their checksums."""

    def __init__(self, source: HFFolder, dtype: torch.dtype | None) -> None:
        self.source = source
        self.dtype = dtype
        self.records: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def read(self, name: str, *, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self.source.read(name, dim=dim, start=start, stop=stop)
        assert tuple(tensor.shape) == self.source.shape(name), "whole tensors are read"
        tensor = converted(name, tensor, self.dtype)
        record = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "crc32": checksum(tensor),
        }
        with self._lock:
            self.records[name] = record
        return tensor

    def stored_dtype(self, entry: Entry) -> torch.dtype:
        """Type in which an entry is stored."""
        return self.dtype or self.source.dtype(next(iter(entry.operation.hf_shapes())))


def _parts(where: CheckpointLayout, reading: _Checked, progress: TensorDone) -> list[Part]:
    shapes, copied = where.shapes(), {old: new for new, old in where.copies.items()}

    def make(entry: Entry, key: str) -> Tensor:
        tensor = entry.operation.read(reading, 0, 1).contiguous()
        if key not in where.copies:
            names = entry.operation.hf_shapes()
            progress(key, sum(map(prod, names.values())) * tensor.itemsize)
        return tensor

    return [
        Part(
            key=key,
            size=shapes[place.key],
            lead=place.lead,
            dtype=reading.stored_dtype(entry),
            make=partial(make, entry, key),
        )
        for entry, place in where.pairs()
        for key in (place.key, copied.get(place.key))
        if key is not None
    ]


def _check_one_type(entries: list[Entry], source: HFFolder) -> None:
    """Megatron stores equal layers as one tensor: they must have one type."""
    first: dict[str, str] = {}
    for entry in entries:
        kind = entry.name if entry.layer is None else entry.name.split(".", 3)[3]
        for name in entry.operation.hf_shapes():
            other = first.setdefault(kind, name)
            if source.dtype(name) != source.dtype(other):
                raise InputError(
                    f"Model folder {source.path} holds {other} as {source.dtype(other)} and {name} "
                    f"as {source.dtype(name)}, which Megatron stores in one tensor. Give --dtype "
                    "to convert them to one type."
                )


def _check_tied(reading: _Checked, redundant: list[str]) -> None:
    """A tied model may carry its output layer too, if it really is the embedding."""
    for name in redundant:
        reading.read(EMBEDDING)
        reading.read(name)
        if reading.records[EMBEDDING] != reading.records[name]:
            raise not_tied(f"Model folder {reading.source.path}")


def _write_checksums(folder: Path, reading: _Checked) -> None:
    names = {name: reading.source.stored_name(name) for name in sorted(reading.records)}
    content = {
        "format": 1,
        "tensors": {name: reading.records[name] for name in names},
        "stored_as": {name: stored for name, stored in names.items() if name != stored},
    }
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1) + "\n")


def _arguments(
    hf_config: dict[str, Any], padded: int, job: ToMegatron, dtype: torch.dtype
) -> Namespace:
    """The settings Megatron takes from a checkpoint (--use-checkpoint-args)."""
    shape = model_shape(hf_config)
    rope = rope_parameters(hf_config)
    base, factor = rope["rope_theta"], rope.get("factor", 8.0)
    linear = rope["rope_type"] == "linear"
    return Namespace(
        **_architecture(shape),
        rotary_base=int(base) if float(base).is_integer() else base,
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=factor,
        rotary_seq_len_interpolation_factor=factor if linear else None,
        padded_vocab_size=padded,
        vocab_size=shape.vocab,
        make_vocab_size_divisible_by=_VOCAB_MULTIPLE,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=job.tensor_parallel,
        pipeline_model_parallel_size=job.pipeline_parallel,
        expert_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        data_parallel_size=1,
        world_size=job.tensor_parallel * job.pipeline_parallel,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        tokenizer_type="HuggingFaceTokenizer",
    )


def _architecture(shape: ModelShape) -> dict[str, Any]:
    settings = shape.megatron_fields() | {
        "group_query_attention": shape.kv_heads != shape.heads,
        "max_position_embeddings": shape.context,
        "seq_length": shape.context,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # Megatron's default; without effect beside rope
        "use_rotary_position_embeddings": True,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "swiglu": True,
        "squared_relu": False,
        "norm_epsilon": shape.rms_eps,  # until Megatron 0.19, which says layernorm_epsilon
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "untie_embeddings_and_output_weights": not shape.tied,
    }
    if shape.experts:
        settings |= {
            "num_experts": shape.experts.count,
            "moe_router_score_function": "softmax",
            "moe_layer_freq": 1,
        }
    return settings
