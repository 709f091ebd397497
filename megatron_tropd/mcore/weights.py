"""Weights between HF folders and Megatron models: each rank reads its part; exports stream.

An export walks the parameters in buckets. The tensor-parallel ranks that own a bucket (of its stage
and, for experts, of the replica that has them) gather it, the result travels to the receivers, and
only they make HF tensors of it: no rank ever holds the whole model twice.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.checks import check_tensors
from megatron_tropd.convert.families import Entry, ModelShape, Source, model_shape, plan
from megatron_tropd.convert.hf_folder import EMBEDDING, HEAD, HFFolder
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.layout import Layout

_BUCKET_BYTES = 256 * 2**20
_UNFUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EXPERTS = "mlp.experts.experts."
_LAYERS = "decoder.layers."


def named_parameters(chunks: Iterable[GPTModel]) -> dict[str, Parameter]:
    """Find a rank's parameters by their names in the whole model.

    A chunk counts its layers from 0; here they have their numbers in the whole model.
    """
    return {
        in_whole_model(chunk, name): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def in_whole_model(chunk: GPTModel, name: str) -> str:
    """The name in the whole model of a parameter or module of a chunk."""
    if not name.startswith(_LAYERS):
        return name
    number, _, rest = name.removeprefix(_LAYERS).partition(".")
    # Megatron counts them from 1.
    first = chunk.decoder.layers[0].layer_number - 1
    return f"{_LAYERS}{first + int(number)}.{rest}"


def load_weights(
    parameters: Mapping[str, Tensor], folder: HFFolder, layout: Layout, *, padded_vocab_size: int
) -> None:
    """Fill this rank's parameters from the folder, reading only this rank's slices.

    Args:
        parameters: all of this rank's, by their names in the whole model.
        folder: where to read.
        layout: this rank's place.
        padded_vocab_size: rows of the model's padded embedding.

    Raises:
        InputError: a tensor is missing, surplus, or of another shape than config.json says.
    """
    check_tensors(folder)
    entries = plan(folder.config, padded_vocab_size)
    fill(parameters, entries, model_shape(folder.config), folder, layout)


@torch.no_grad()
def fill(
    parameters: Mapping[str, Tensor],
    entries: list[Entry],
    shape: ModelShape,
    source: Source,
    layout: Layout,
) -> None:
    """Fill parameters of this rank, reading only its slices; each must be met by an entry.

    Args:
        parameters: by their names in the whole model.
        entries: of all ranks.
        shape: of the model.
        source: of the tensors that the entries name.
        layout: this rank's place.
    """
    for entry, name in _own_names(entries, list(parameters), shape, layout):
        place = (layout.tp_rank, layout.tp_size) if entry.expert is None else layout.expert_shard()
        shard = entry.operation.read(source, *place)
        parameters[name].copy_(shard.view_as(parameters[name]))


def export_weights(
    parameters: Mapping[str, Tensor],
    hf_config: dict[str, Any],
    layout: Layout,
    *,
    padded_vocab_size: int,
    dtype: torch.dtype | None = None,
    receivers: Sequence[int] = (0,),
    explicit_lm_head: bool = False,
    bucket_bytes: int = _BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor | None]]:
    """Walk the model as HF tensors. Every rank must exhaust the iterator.

    Args:
        parameters: by their names in the whole model; each is asked for when it is its turn.
        hf_config: the model's config.json dictionary.
        layout: this rank's place.
        padded_vocab_size: rows of the padded embedding.
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
    entries, shape = plan(hf_config, padded_vocab_size), model_shape(hf_config)
    stream = export_entries(
        parameters, entries, shape, layout,
        dtype=dtype, receivers=receivers, bucket_bytes=bucket_bytes,
    )  # fmt: skip
    for name, tensor in stream:
        yield name, tensor
        if explicit_lm_head and shape.tied and name == EMBEDDING:
            yield HEAD, tensor


def export_entries(
    parameters: Mapping[str, Tensor],
    entries: list[Entry],
    shape: ModelShape,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    receivers: Sequence[int] = (0,),
    bucket_bytes: int = _BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor | None]]:
    """:func:`export_weights` of some parameters, which have ``entries``."""
    # Names alone: a mapping that makes its parameters would make one to say whether it has it.
    own = dict(_own_names(entries, list(parameters), shape, layout))
    dtype = dtype or next(iter(parameters.values())).dtype
    for bucket in _buckets(entries, shape, layout, dtype.itemsize, bucket_bytes):
        shards = _collect(bucket, lambda e: parameters[own[e]], layout, receivers, dtype)
        for entry in bucket.entries:
            tensors: dict[str, Tensor | None] = dict.fromkeys(entry.operation.hf_shapes())
            if shards is not None:
                tensors |= entry.operation.merge(shards[entry])
            yield from tensors.items()


@dataclass(frozen=True)
class _Bucket:
    """Entries that lie on the same ranks."""

    home: "_Home"
    entries: list[Entry]

    def sender(self, receiver: int, layout: Layout) -> int:
        """The rank that has the bucket for ``receiver``: its own replica's, or a neighbour's."""
        tp_rank, _, replica = layout.place(receiver)
        rank = layout.global_rank(tp_rank=tp_rank, pp_rank=self.home.stage, replica=replica)
        return rank if self.home.ep_rank is None else layout.neighbour(rank, self.home.ep_rank)


@dataclass(frozen=True)
class _Home:
    """The ranks that hold an entry."""

    stage: int
    ep_rank: int | None
    """Which part of the experts; None: what every replica holds."""
    shards: int
    """Tensor-parallel ranks that have a part each; 1: a rank has it whole."""


def _stage_of(entry: Entry, layers: int, layout: Layout) -> int:
    if entry.layer is not None:
        stages = stage_chunks(layers, layout.pp_size, layout.vp_size)
        return next(n for n, chunks in enumerate(stages) if any(entry.layer in c for c in chunks))
    return 0 if entry.name.startswith("embedding.") else layout.pp_size - 1


def _home(entry: Entry, shape: ModelShape, layout: Layout) -> _Home:
    stage = _stage_of(entry, shape.layers, layout)
    if entry.expert is None or shape.experts is None:
        return _Home(stage, None, layout.tp_size)
    part = entry.expert * layout.ep_size // shape.experts.count if layout.ep_size > 1 else None
    return _Home(stage, part, layout.etp_size)


def _buckets(
    entries: list[Entry], shape: ModelShape, layout: Layout, itemsize: int, limit: int
) -> Iterator[_Bucket]:
    for home, group in itertools.groupby(entries, lambda entry: _home(entry, shape, layout)):
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


def _own_names(
    entries: list[Entry], parameters: Collection[str], shape: ModelShape, layout: Layout
) -> list[tuple[Entry, str]]:
    """Pair this rank's entries with its parameters; each parameter must be met once."""
    first_expert = layout.ep_rank * shape.experts.count // layout.ep_size if shape.experts else 0
    pairs = [
        (entry, _name(entry, parameters, first_expert))
        for entry in entries
        if (home := _home(entry, shape, layout)).stage == layout.pp_rank
        and home.ep_rank in (None, layout.ep_rank)
    ]
    if "output_layer.weight" in parameters and shape.tied:
        # The last stage's own copy of a tied embedding.
        pairs.append((entries[0], "output_layer.weight"))
    met = {name for _, name in pairs}
    forgotten = [name for name in parameters if name not in met]
    if forgotten:
        raise InputError(f"No HF tensor fills the parameters {', '.join(forgotten[:3])}.")
    return pairs


def _name(entry: Entry, parameters: Collection[str], first_expert: int) -> str:
    """What this rank's model calls an entry."""
    if entry.layer is None:
        return entry.name
    prefix, rest = f"{_LAYERS}{entry.layer}", entry.name.split(".", 3)[3]
    names = [rest, _UNFUSED_NORMS.get(rest, rest)]
    if entry.expert is not None:
        expert, weight = entry.expert - first_expert, rest.removeprefix(_EXPERTS)
        # Megatron's own experts are modules; Transformer Engine's are weights of one.
        names = [f"mlp.experts.local_experts.{expert}.{weight}", f"mlp.experts.{weight}{expert}"]
    return next(full for name in names if (full := f"{prefix}.{name}") in parameters)


def _collect(
    bucket: _Bucket,
    shard_of: Callable[[Entry], Tensor],
    layout: Layout,
    receivers: Sequence[int],
    dtype: torch.dtype,
) -> dict[Entry, list[Tensor]] | None:
    """Bring a bucket to its receivers: entry -> shards; None on the other ranks."""
    shards = bucket.home.shards
    shapes = [entry.operation.shard_shape(shards) for entry in bucket.entries]
    senders = [bucket.sender(receiver, layout) for receiver in receivers]
    # A bucket in one piece is its sender's alone; else all its tensor-parallel ranks take part.
    here = [layout.place(rank) for rank in senders if shards > 1 or rank == layout.rank]
    mine = (layout.pp_rank, layout.replica)
    places = {tp_rank for tp_rank, *rest in here if tuple(rest) == mine}
    gathered = None
    if places:
        local = torch.cat([shard_of(e).detach().flatten().to(dtype) for e in bucket.entries])
        gathered = _gather(local, layout, places) if shards > 1 else local.unsqueeze(0)
    flat_shards = _deliver(bucket, gathered, sum(map(prod, shapes)), layout, receivers, dtype)
    if flat_shards is None:
        return None
    pieces = [flat.split([prod(shape) for shape in shapes]) for flat in flat_shards]
    return {
        entry: [piece[i].view(shape) for piece in pieces]
        for i, (entry, shape) in enumerate(zip(bucket.entries, shapes, strict=True))
    }


def _gather(local: Tensor, layout: Layout, places: set[int]) -> Tensor | None:
    """[tp_size, n] on the tensor-parallel ranks in ``places``, None on the others."""
    if len(places) > 1:
        everything = local.new_empty(layout.tp_size, local.numel())
        dist.all_gather_into_tensor(everything.view(-1), local, group=layout.tp_group)
        return everything if layout.tp_rank in places else None
    place = next(iter(places))
    gathered: Tensor | None = None
    if layout.tp_rank == place:
        gathered = local.new_empty(layout.tp_size, local.numel())
    destination = dist.get_global_rank(layout.tp_group, place)
    dist.gather(
        local,
        None if gathered is None else list(gathered.unbind(0)),
        dst=destination,
        group=layout.tp_group,
    )
    return gathered


def _deliver(
    bucket: _Bucket,
    gathered: Tensor | None,
    size: int,
    layout: Layout,
    receivers: Sequence[int],
    dtype: torch.dtype,
) -> Tensor | None:
    """[shards, size] on the receivers, sent where another rank has it; None elsewhere."""
    received = None
    for receiver in receivers:
        sender = bucket.sender(receiver, layout)
        if layout.rank == sender == receiver:
            received = gathered
        elif layout.rank == sender and gathered is not None:
            dist.send(gathered, receiver)
        elif layout.rank == receiver:
            shape = (bucket.home.shards, size)
            received = torch.empty(shape, dtype=dtype, device=platform.device())
            dist.recv(received, sender)
    return received
