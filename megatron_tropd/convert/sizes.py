"""What every rank must agree on before a model exists: padded rows, layers of a stage, work."""

import itertools
from typing import Any

from megatron_tropd.convert.families import ModelShape, model_shape

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


def stage_sizes(layers: int, pp_size: int, vp_size: int = 1) -> list[int]:
    """Layers of each pipeline stage; if they do not divide, the first chunks take one more."""
    return [sum(map(len, chunks)) for chunks in stage_chunks(layers, pp_size, vp_size)]


def stage_chunks(layers: int, pp_size: int, vp_size: int = 1) -> list[list[range]]:
    """Layers of each chunk of each pipeline stage, by their numbers in the whole model.

    A stage without virtual stages has one chunk. With them chunk after chunk goes to the next
    stage, and after the last one to the first again: Megatron's interleaved order.
    """
    size, rest = divmod(layers, pp_size * vp_size)
    starts = [chunk * size + min(chunk, rest) for chunk in range(pp_size * vp_size + 1)]
    chunks = [range(*bounds) for bounds in itertools.pairwise(starts)]
    return [chunks[stage::pp_size] for stage in range(pp_size)]


def row_flops(shape: ModelShape, length: int) -> float:
    """Floating-point operations of a row's forward pass: products, causal attention, logits.

    Two for each parameter that a position is multiplied with, an output layer at each position;
    scores and values for half of the row before each position, or a layer's window.
    """
    hidden, heads = shape.hidden, shape.heads * shape.head_dim
    attention = 2 * hidden * (heads + shape.kv_heads * shape.head_dim)
    mlp = 3 * hidden * shape.ffn
    if shape.experts:
        mlp = hidden * (3 * shape.experts.per_token * shape.experts.ffn + shape.experts.count)
    products = shape.layers * (attention + mlp) + hidden * shape.vocab
    seen = sum(min(length / 2, window or length) for window in shape.windows or (None,))
    if not shape.windows:
        seen *= shape.layers
    return length * (2 * products + 4 * heads * seen)
