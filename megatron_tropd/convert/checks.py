"""Whether a model folder is whole and can be laid out as asked, from its headers."""

from collections.abc import Iterable
from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.accounting import (
    account,
    check_shapes,
    check_types,
    expected_tensors,
)
from megatron_tropd.convert.families import Entry, ModelShape, model_shape
from megatron_tropd.convert.hf_folder import EMBEDDING, HEAD, HFFolder


def check_parallel(hf_config: dict[str, Any], parallel: ParallelConfig, *, who: str) -> None:
    """Check that a model can be laid out.

    Raises:
        ConfigError: a size does not divide.
        InputError: the architecture is not supported.
    """
    check_layout(model_shape(hf_config), parallel, who=who)


def check_layout(shape: ModelShape, parallel: ParallelConfig, *, who: str) -> None:
    """:func:`check_parallel` of an architecture that is known."""
    tensor = parallel.tensor
    sharded = [("attention heads", shape.heads), ("key/value heads", shape.kv_heads)]
    if shape.experts is None:
        sharded.append(("intermediate size", shape.ffn))
    elif parallel.shards_of_expert > 1:
        sharded.append(("intermediate size", shape.experts.ffn))
    for what, size in sharded:
        if size % tensor:
            raise ConfigError(
                f"{parallel.key('tensor')} = {tensor} must divide the {who}'s {what}, found "
                f"{size}. Choose another {parallel.key('tensor')}."
            )
    _check_chunks(shape.layers, parallel, who)
    if shape.experts is not None:
        _check_experts(shape.experts.count, parallel, who)


def _check_chunks(layers: int, parallel: ParallelConfig, who: str) -> None:
    """Refuse layers that the stages, or their virtual stages, cannot share."""
    pipeline, uneven = parallel.key("pipeline"), parallel.key("uneven_stages")
    setting, part = f"{pipeline} = {parallel.pipeline}", "stage"
    if parallel.virtual_pipeline > 1:
        setting = (
            f"{pipeline} x virtual_pipeline = {parallel.pipeline} x "
            f"{parallel.virtual_pipeline} = {parallel.num_chunks}"
        )
        part = "virtual stage"
    if layers % parallel.num_chunks and not parallel.uneven_stages:
        raise ConfigError(
            f"{setting} must divide the {who}'s layers, found {layers}. "
            f"Choose another {pipeline} or set {uneven} = true."
        )
    if layers < parallel.num_chunks:
        raise ConfigError(
            f"{setting} exceeds the {who}'s layers, found {layers}: every {part} needs one. Lower "
            "it."
        )


def check_expert_parallel(parallel: ParallelConfig, shapes: Iterable[ModelShape]) -> None:
    """Refuse expert parallelism of models that are all dense.

    Raises:
        ConfigError: so it is.
    """
    if parallel.expert > 1 and not any(shape.experts for shape in shapes):
        raise ConfigError(
            f"{parallel.key('expert')} = {parallel.expert} needs a mixture of experts, and every "
            f"model that is laid out so is dense. Set {parallel.key('expert')} = 1."
        )


def check_engine_shards(shape: ModelShape, gpus: int, *, who: str) -> None:
    """Check what vLLM asks of a tensor-parallel model; it pads vocabularies to multiples of 64.

    Raises:
        ConfigError: a size does not divide. ``who`` is how the message calls the model.
    """
    few, many = sorted((gpus, shape.kv_heads))
    ffn, vocab = shape.experts.ffn if shape.experts else shape.ffn, -(-shape.vocab // 64) * 64
    divided = {
        "attention heads": (shape.heads, shape.heads % gpus),
        "intermediate size": (ffn, ffn % gpus),
        "vocabulary, padded to a multiple of 64,": (vocab, vocab % gpus),
        "key/value heads": (shape.kv_heads, many % few),  # more GPUs than heads: each gets a copy
    }
    for what, (size, rest) in divided.items():
        if rest:
            raise ConfigError(
                f"rollout.engine_tensor_parallel = {gpus} must divide the {what} of {who}, found "
                f"{size}. Choose another."
            )


def check_tensors(folder: HFFolder) -> None:
    """Account for every tensor of a folder, from the headers.

    Only if a tied model carries its output layer too, two tensors are read: they must be one.

    Raises:
        InputError: as :func:`check_headers`, or the output layer of a tied model is not its
            embedding.
    """
    _, redundant = check_headers(folder)
    if not all(folder.equal(EMBEDDING, name) for name in redundant):
        raise not_tied(f"Model folder {folder.path}")


def check_headers(folder: HFFolder) -> tuple[list[Entry], list[str]]:
    """Account for every tensor of a folder and read none.

    Returns:
        The plan, and the redundant tensors of the folder: the output layer of a tied model.

    Raises:
        InputError: the model is quantised, or a tensor is missing, surplus, no float, or of
            another shape than config.json says.
    """
    where = f"Model folder {folder.path}"
    entries, redundant = account(folder.config, folder.names, where)
    expected = expected_tensors(entries)
    check_shapes(expected, {name: folder.shape(name) for name in expected}, where, folder.config)
    check_types({name: folder.dtype(name) for name in expected}, where)
    return entries, redundant


def not_tied(where: str) -> InputError:
    """The error of a tied model with an output layer of its own; ``where``: the folder."""
    return InputError(
        f"{where} has tie_word_embeddings = true in config.json, but its {HEAD} differs from "
        f"{EMBEDDING}: readers disagree on which is the output layer. Set it to false if the model "
        f"is not tied, or remove {HEAD} if it is."
    )


def _check_experts(count: int, parallel: ParallelConfig, who: str) -> None:
    if count % parallel.expert:
        raise ConfigError(
            f"{parallel.key('expert')} = {parallel.expert} must divide the {who}'s experts, found "
            f"{count}. Choose another {parallel.key('expert')}."
        )
    # Without it every tensor-parallel rank would send the same tokens to the experts.
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"The {who} is a mixture of experts: {parallel.key('tensor')} = {parallel.tensor} "
            f"needs {parallel.key('sequence_parallel')} = true, found false."
        )
