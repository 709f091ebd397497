"""Sizes that every rank must agree on before a model exists: padded rows, layers of a stage."""

from typing import Any

from megatron_tropd.convert.families import model_shape

_VOCAB_MULTIPLE = 64


def padded_vocab_size(*hf_configs: dict[str, Any], tensor: int) -> int:
    """Rows of the embeddings of models that are trained together, so that their shards align.

    The largest vocabulary, rounded up to a multiple of 64 and of ``tensor``: the same for every
    power of two, so that checkpoints move between layouts.
    """
    largest = max(model_shape(config).vocab for config in hf_configs)
    multiple = _VOCAB_MULTIPLE
    while multiple % tensor:
        multiple += _VOCAB_MULTIPLE
    return -(-largest // multiple) * multiple


def stage_sizes(layers: int, pp_size: int) -> list[int]:
    """Layers of each pipeline stage; if they do not divide, the first stages take one more."""
    size, rest = divmod(layers, pp_size)
    return [size + (stage < rest) for stage in range(pp_size)]
