"""Weights between HF folders and Megatron models: each rank reads its part; exports stream.

An export walks the parameters in buckets. The tensor-parallel ranks that own a bucket (of its stage
and, for experts, of the replica that has them) gather it, the result travels to the receivers, and
only they make HF tensors of it: no rank ever holds the whole model twice.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.convert.checks import check_tensors
from megatron_tropd.convert.companions import copy_companions
from megatron_tropd.convert.families import Entry, ModelShape, model_shape, plan
from megatron_tropd.convert.hf_folder import INDEX, SINGLE, HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.layout import Layout

_BUCKET_BYTES = 256 * 2**20
_UNFUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EXPERTS = "mlp.experts.experts."


def load_weights(
    model: torch.nn.Module, folder: HFFolder, *, ranks: Layout, padded_vocab_size: int
) -> None:
    """Fill this rank's parameters from the folder, reading only this rank's slices.

    Args:
        model: an unwrapped GPTModel.
        folder: where to read.
        ranks: this rank's place.
        padded_vocab_size: rows of the model's padded embedding.

    Raises:
        InputError: a tensor is missing, surplus, or of another shape than config.json says.
    """
    entries = plan(folder.config, padded_vocab_size)
    check_tensors(folder)
    parameters = dict(model.named_parameters())
    shape = model_shape(folder.config)
    for entry, parameter in _own_parameters(entries, parameters, shape, ranks):
        place = (ranks.tp_rank, ranks.tp_size) if entry.expert is None else ranks.expert_shard()
        shard = entry.operation.read(folder, *place)
        with torch.no_grad():
            parameter.copy_(shard)


def export_weights(
    model: torch.nn.Module,
    hf_config: dict[str, Any],
    ranks: Layout,
    *,
    padded_vocab_size: int,
    dtype: torch.dtype | None = None,
    receivers: Sequence[int] = (0,),
    explicit_lm_head: bool = False,
    bucket_bytes: int = _BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor | None]]:
    """Walk the model as HF tensors. Every rank must exhaust the iterator.

    Args:
        model: an unwrapped GPTModel.
        hf_config: its config.json dictionary.
        ranks: this rank's place.
        padded_vocab_size: rows of its padded embedding.
        dtype: of the tensors; None: the parameters'.
        receivers: global ranks that get the tensors; the others get None.
        explicit_lm_head: also yield ``lm_head.weight`` of a tied model.
        bucket_bytes: gathered at once.

    Yields:
        (HF name, the whole tensor on this rank's device, or None), in the same order everywhere.

    Collectives: per bucket one gather in the tensor-parallel group (all-gather where several of its
    places receive) and one send to each receiver on another stage or, for experts, on another of
    the replicas that share them; buckets cross neither stages nor those.
    """
    entries, model_is = plan(hf_config, padded_vocab_size), model_shape(hf_config)
    parameters = dict(model.named_parameters())
    own = {
        entry: parameter
        for entry, parameter in _own_parameters(entries, parameters, model_is, ranks)
    }
    dtype = dtype or next(model.parameters()).dtype
    for bucket in _buckets(entries, model_is, ranks, dtype.itemsize, bucket_bytes):
        shards = _collect(bucket, own, ranks, receivers, dtype)
        for entry in bucket.entries:
            tensors: dict[str, Tensor | None] = dict.fromkeys(entry.operation.hf_shapes())
            if shards is not None:
                tensors |= entry.operation.merge(shards[entry])
            yield from tensors.items()
            if explicit_lm_head and model_is.tied and entry.name.startswith("embedding."):
                yield "lm_head.weight", tensors["model.embed_tokens.weight"]


def save_hf(
    model: torch.nn.Module,
    source: HFFolder | MegatronFolder,
    out: str | Path,
    ranks: Layout,
    *,
    padded_vocab_size: int,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the model as a complete HF folder: config, tokenizer, weights. Collective.

    The folder appears under its name only when everything is in it; an older one is replaced.

    Args:
        model: an unwrapped GPTModel.
        source: the folder it was built from; everything but its weights is copied.
        out: the folder to write. On rank 0's file system.
        ranks: this rank's place.
        padded_vocab_size: rows of the model's padded embedding.
        dtype: of the saved weights; None: the parameters'.
        max_file_bytes: larger models are split into files of at most this size.

    Raises:
        TrainingError: writing failed, on every rank; an older folder is still there.

    Collectives: those of :func:`export_weights`, one broadcast of the outcome on all ranks.
    """
    dtype = dtype or next(model.parameters()).dtype
    stream = export_weights(
        model, source.config, ranks, padded_vocab_size=padded_vocab_size, dtype=dtype
    )
    failure: list[str | None] = [None]
    if ranks.is_main:
        try:
            _write_folder(stream, source, Path(out), dtype, max_file_bytes)
        except (OSError, SafetensorError) as error:
            failure = [str(error)]
    for _ in stream:
        pass
    if ranks.world_size > 1:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise TrainingError(
            f"The export to {out} could not be written: {failure[0]}. Make room, then give the "
            "same command again.",
            kind="disk",
        )


@dataclass(frozen=True)
class _Bucket:
    """Entries that lie on the same ranks."""

    home: "_Home"
    entries: list[Entry]

    def sender(self, receiver: int, ranks: Layout) -> int:
        """The rank that has the bucket for ``receiver``: its own replica's, or a neighbour's."""
        tp_rank, _, dp_rank = ranks.place(receiver)
        rank = ranks.global_rank(tp_rank=tp_rank, pp_rank=self.home.stage, dp_rank=dp_rank)
        return rank if self.home.ep_rank is None else ranks.neighbour(rank, self.home.ep_rank)


@dataclass(frozen=True)
class _Home:
    """The ranks that hold an entry."""

    stage: int
    ep_rank: int | None
    """Which part of the experts; None: what every replica holds."""
    shards: int
    """Tensor-parallel ranks that have a part each; 1: a rank has it whole."""


def _stage_of(entry: Entry, layers: int, pp_size: int) -> int:
    if entry.layer is not None:
        ends = itertools.accumulate(stage_sizes(layers, pp_size))
        return next(stage for stage, end in enumerate(ends) if entry.layer < end)
    return 0 if entry.name.startswith("embedding.") else pp_size - 1


def _home(entry: Entry, shape: ModelShape, ranks: Layout) -> _Home:
    stage = _stage_of(entry, shape.layers, ranks.pp_size)
    if entry.expert is None or shape.experts is None:
        return _Home(stage, None, ranks.tp_size)
    part = entry.expert * ranks.ep_size // shape.experts.count if ranks.ep_size > 1 else None
    return _Home(stage, part, ranks.etp_size)


def _buckets(
    entries: list[Entry], shape: ModelShape, ranks: Layout, itemsize: int, limit: int
) -> Iterator[_Bucket]:
    for home, group in itertools.groupby(entries, lambda entry: _home(entry, shape, ranks)):
        bucket: list[Entry] = []
        held = 0
        for entry in group:
            size = prod(entry.operation.shard_shape(home.shards)) * itemsize * home.shards
            if bucket and held + size > limit:
                yield _Bucket(home, bucket)
                bucket, held = [], 0
            bucket.append(entry)
            held += size
        yield _Bucket(home, bucket)


def _own_parameters(
    entries: list[Entry],
    parameters: dict[str, torch.nn.Parameter],
    shape: ModelShape,
    ranks: Layout,
) -> list[tuple[Entry, torch.nn.Parameter]]:
    """Pair this rank's entries with its parameters; each parameter must be met once."""
    first_layer = sum(stage_sizes(shape.layers, ranks.pp_size)[: ranks.pp_rank])
    first_expert = ranks.ep_rank * shape.experts.count // ranks.ep_size if shape.experts else 0
    pairs = [
        (entry, _parameter(entry, parameters, first_layer, first_expert))
        for entry in entries
        if (home := _home(entry, shape, ranks)).stage == ranks.pp_rank
        and home.ep_rank in (None, ranks.ep_rank)
    ]
    if "output_layer.weight" in parameters and shape.tied:
        # The last stage's own copy of a tied embedding.
        pairs.append((entries[0], parameters["output_layer.weight"]))
    met = {id(parameter) for _, parameter in pairs}
    forgotten = [name for name, parameter in parameters.items() if id(parameter) not in met]
    if forgotten:
        raise InputError(f"No HF tensor fills the parameters {', '.join(forgotten[:3])}.")
    return pairs


def _parameter(
    entry: Entry,
    parameters: dict[str, torch.nn.Parameter],
    first_layer: int,
    first_expert: int,
) -> torch.nn.Parameter:
    if entry.layer is None:
        return parameters[entry.name]
    prefix, rest = f"decoder.layers.{entry.layer - first_layer}", entry.name.split(".", 3)[3]
    names = [rest, _UNFUSED_NORMS.get(rest, rest)]
    if entry.expert is not None:
        expert, weight = entry.expert - first_expert, rest.removeprefix(_EXPERTS)
        # Megatron's own experts are modules; Transformer Engine's are weights of one.
        names = [f"mlp.experts.local_experts.{expert}.{weight}", f"mlp.experts.{weight}{expert}"]
    name = next(name for name in names if f"{prefix}.{name}" in parameters)
    return parameters[f"{prefix}.{name}"]


def _collect(
    bucket: _Bucket,
    own: dict[Entry, torch.nn.Parameter],
    ranks: Layout,
    receivers: Sequence[int],
    dtype: torch.dtype,
) -> dict[Entry, list[Tensor]] | None:
    """Bring a bucket to its receivers: entry -> shards; None on the other ranks."""
    shards = bucket.home.shards
    shapes = [entry.operation.shard_shape(shards) for entry in bucket.entries]
    senders = [bucket.sender(receiver, ranks) for receiver in receivers]
    # A bucket in one piece is its sender's alone; else all its tensor-parallel ranks take part.
    here = [ranks.place(rank) for rank in senders if shards > 1 or rank == ranks.rank]
    mine = (ranks.pp_rank, ranks.dp_rank)
    places = {tp_rank for tp_rank, pp_rank, dp_rank in here if (pp_rank, dp_rank) == mine}
    gathered = None
    if places:
        local = torch.cat([own[e].detach().flatten().to(dtype) for e in bucket.entries])
        gathered = _gather(local, ranks, places) if shards > 1 else local.unsqueeze(0)
    flat_shards = _deliver(bucket, gathered, sum(map(prod, shapes)), ranks, receivers, dtype)
    if flat_shards is None:
        return None
    pieces = [flat.split([prod(shape) for shape in shapes]) for flat in flat_shards]
    return {
        entry: [piece[i].view(shape) for piece in pieces]
        for i, (entry, shape) in enumerate(zip(bucket.entries, shapes, strict=True))
    }


def _gather(local: Tensor, ranks: Layout, places: set[int]) -> Tensor | None:
    """[tp_size, n] on the tensor-parallel ranks in ``places``, None on the others."""
    if len(places) > 1:
        everything = local.new_empty(ranks.tp_size, local.numel())
        dist.all_gather_into_tensor(everything.view(-1), local, group=ranks.tp_group)
        return everything if ranks.tp_rank in places else None
    place = next(iter(places))
    gathered: Tensor | None = None
    if ranks.tp_rank == place:
        gathered = local.new_empty(ranks.tp_size, local.numel())
    destination = dist.get_global_rank(ranks.tp_group, place)
    dist.gather(
        local,
        None if gathered is None else list(gathered.unbind(0)),
        dst=destination,
        group=ranks.tp_group,
    )
    return gathered


def _deliver(
    bucket: _Bucket,
    gathered: Tensor | None,
    size: int,
    ranks: Layout,
    receivers: Sequence[int],
    dtype: torch.dtype,
) -> Tensor | None:
    """[shards, size] on the receivers, sent where another rank has it; None elsewhere."""
    received = None
    for receiver in receivers:
        sender = bucket.sender(receiver, ranks)
        if ranks.rank == sender == receiver:
            received = gathered
        elif ranks.rank == sender and gathered is not None:
            dist.send(gathered, receiver)
        elif ranks.rank == receiver:
            shape = (bucket.home.shards, size)
            received = torch.empty(shape, dtype=dtype, device=platform.device())
            dist.recv(received, sender)
    return received


def _write_folder(
    stream: Iterator[tuple[str, Tensor | None]],
    source: HFFolder | MegatronFolder,
    out: Path,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        copy_companions(source.companions, partial)
        config = source.config | {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        files = _assign_files(source.config, dtype, max_file_bytes)
        named = ((source.stored_name(name), tensor) for name, tensor in stream)
        _write_tensors(named, partial, {source.stored_name(n): file for n, file in files.items()})
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _assign_files(hf_config: dict[str, Any], dtype: torch.dtype, limit: int) -> dict[str, str]:
    """HF name -> file name, in the order of the export, so that files fill one after another."""
    numbers: dict[str, int] = {}
    number, held = 1, 0
    for entry in plan(hf_config):
        for name, shape in entry.operation.hf_shapes().items():
            size = prod(shape) * dtype.itemsize
            if held and held + size > limit:
                number, held = number + 1, 0
            numbers[name] = number
            held += size
    if number == 1:
        return dict.fromkeys(numbers, SINGLE)
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _write_tensors(
    stream: Iterator[tuple[str, Tensor | None]], folder: Path, files: dict[str, str]
) -> None:
    size = 0
    received = ((files[name], name, tensor) for name, tensor in stream if tensor is not None)
    for file_name, group in itertools.groupby(received, lambda item: item[0]):
        tensors = {name: tensor.cpu().contiguous() for _, name, tensor in group}
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, str(folder / file_name), metadata={"format": "pt"})
    if set(files.values()) != {SINGLE}:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _replace(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
