r"""Bytes that a forward pass leaves for the backward pass.

Per position and layer, after Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4), with gated MLPs, grouped queries, fused attention
(no scores), no dropout, and no recomputation, for the trainer does none.

Letters: h = hidden, a = query columns, g = key columns, f = MLP columns of one rank (the last
three divided by the tensor-parallel size t), k = experts of a token, e = bytes of an element.
Under sequence parallelism h is h / t wherever the sequence is sharded.
"""

from dataclasses import dataclass

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.families import Experts, ModelShape
from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.planning.hardware import Layers

_STATISTIC = 4
"""Bytes of a norm's or a softmax's statistic, float32."""
_PER_ROUTE = 32
"""Bytes of the ids that bring one routed token to its expert and back; measured."""


@dataclass(frozen=True)
class Widths:
    """Columns of the tensors of one rank, and how layers save them."""

    hidden: int
    sharded_hidden: float
    """Of the parts between the tensor-parallel regions."""
    routed_hidden: float
    """Of a routed copy of a token: all ranks of a sharded expert have it, or one whole expert."""
    query: float
    key: float
    heads: float
    kv_heads: float
    head_dim: int
    ffn: float
    shape: ModelShape
    element: int
    layers: Layers

    @property
    def fused_qkv(self) -> float:
        """Columns of the output of the projection to queries, keys and values."""
        return self.query + 2 * self.key


def widths(shape: ModelShape, parallel: ParallelConfig, element: int, layers: Layers) -> Widths:
    """The columns one rank has.

    Args:
        shape: of the model.
        parallel: the layout.
        element: bytes of an element: 2 for bfloat16, 4 for float32.
        layers: whose layers.
    """
    t = parallel.tensor
    return Widths(
        hidden=shape.hidden,
        sharded_hidden=shape.hidden / (t if parallel.sequence_parallel else 1),
        routed_hidden=shape.hidden * parallel.shards_of_expert / t,
        query=shape.heads * shape.head_dim / t,
        key=shape.kv_heads * shape.head_dim / t,
        heads=shape.heads / t,
        kv_heads=shape.kv_heads / t,
        head_dim=shape.head_dim,
        ffn=(shape.experts.ffn if shape.experts else shape.ffn) / t,
        shape=shape,
        element=element,
        layers=layers,
    )


def saved_per_position(w: Widths) -> float:
    """Bytes of one layer for one position: attention, MLP or mixture, two norms."""
    mlp = _mixture(w, w.shape.experts) if w.shape.experts else _mlp(w)
    return _norms(w) + _attention(w) + mlp


def saved(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    stage: int,
    positions: int,
    length: int,
    micro_batches: int,
    element: int,
    layers: Layers,
) -> float:
    """Most bytes of saved tensors that a rank of a stage holds at a time.

    The schedule is 1F1B: stage i of p begins the backward pass of its first micro-batch when it
    has p - i of them in flight.

    Args:
        shape: of the model.
        parallel: the layout.
        stage: 0-based pipeline stage.
        positions: of a micro-batch, padding included.
        length: of its rows.
        micro_batches: of one replica's step.
        element: bytes of an element.
        layers: whose layers.
    """
    w = widths(shape, parallel, element, layers)
    num_layers = stage_sizes(shape.layers, parallel.pipeline)[stage]
    bytes_of_one = positions * num_layers * saved_per_position(w)
    bytes_of_one += length * num_layers * _rotary_tables(w)
    if stage == 0:
        bytes_of_one += 8 * positions  # the ids, for the embedding
    if stage == parallel.pipeline - 1:
        bytes_of_one += positions * _final(w)
    return bytes_of_one * min(parallel.pipeline - stage, micro_batches)


def _one_norm(w: Widths, columns: float, groups: float = 1) -> float:
    """What a norm keeps beside its output, which belongs to the product that follows."""
    if w.layers == "cpu":  # torch composes it: the input and the normalised input, in float32
        return 2 * columns * 4 + groups * _STATISTIC
    return columns * w.element + groups * _STATISTIC


def _norms(w: Widths) -> float:
    return 2 * (_one_norm(w, w.sharded_hidden) + w.sharded_hidden * w.element)


def _attention(w: Widths) -> float:
    """Queries, keys, values, output (the projection's input too), logarithms of the sums.

    A value is a view of the fused projection and keeps all of it, except where keys and values
    are repeated for every query head.
    """
    repeats = w.shape.heads > w.shape.kv_heads and w.layers != "transformer_engine"
    kept = 4 * w.query if repeats else 2 * w.query + w.key + w.fused_qkv
    kept *= w.element
    return kept + w.heads * _STATISTIC + _qk_norms(w, projection_is_kept=not repeats)


def _qk_norms(w: Widths, *, projection_is_kept: bool) -> float:
    if not w.shape.qk_norm:
        return 0.0
    statistics = (w.heads + w.kv_heads) * _STATISTIC
    if w.layers == "cpu" and w.element == 2:  # inputs become float32 copies
        return 2 * (w.query + w.key) * 4 + statistics
    normalised = (w.query + w.key) * w.element if w.layers == "cpu" else 0.0
    # Of several groups the queries are copied out of the fused projection; a key is a view of it.
    copied = w.query if w.kv_heads > 1 else 0.0
    inputs = copied + (0.0 if projection_is_kept else w.fused_qkv)
    return inputs * w.element + normalised + statistics


def _mlp(w: Widths) -> float:
    """Output of the first product, what the activation keeps of it, input of the second."""
    columns = 5 if w.layers == "cpu" else 3  # unfused, the activation keeps both factors
    return columns * w.ffn * w.element


def _mixture(w: Widths, experts: Experts) -> float:
    """The same for k routed copies of each position, the router, and the routes.

    Routes are taken as even: every rank gets as many tokens as it sends. Each rank of a
    tensor-parallel group sees all tokens routed to it, with its share of every expert's columns;
    with whole experts its share of the tokens, with all columns.
    """
    columns = 6 if w.layers == "cpu" else 3
    one = (w.routed_hidden + columns * w.ffn) * w.element
    routing = experts.per_token * _PER_ROUTE + experts.count * _STATISTIC
    return experts.per_token * one + routing * w.sharded_hidden / w.hidden


def _rotary_tables(w: Widths) -> float:
    """Cosines and sines of queries and of keys, once for all rows."""
    return 4 * w.head_dim * w.element


def _final(w: Widths) -> float:
    """The last norm's input; its output becomes the hidden states of the loss tokens."""
    return _one_norm(w, w.sharded_hidden) + 1
