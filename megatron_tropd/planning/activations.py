r"""Bytes that a forward pass leaves for the backward pass.

Per position and layer, after Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198, section 4), with gated MLPs, grouped queries, fused attention
(no scores) and no dropout. What is recomputed or offloaded is taken off at the end.

Letters: h = hidden, a = query columns, g = key columns, f = MLP columns of one rank (the last
three divided by the tensor-parallel size t), k = experts of a token, e = bytes of an element.
Under sequence parallelism h is h / t wherever the sequence is sharded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_tropd.config import LoraConfig, ParallelConfig
from megatron_tropd.convert.adapters import COLUMN_PARALLEL, OF_EXPERTS
from megatron_tropd.convert.families import Experts, ModelShape
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.planning.hardware import Layers
from megatron_tropd.planning.options import Options, Recompute
from megatron_tropd.planning.planned_run import PlannedRun

_STATISTIC = 4
"""Bytes of a norm's or a softmax's statistic, float32."""
_FLOAT32 = 4
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
    gathered: int
    """Ranks whose keys and values attention keeps; Transformer Engine keeps a rank's own."""
    shape: ModelShape
    element: int
    layers: Layers
    lora: LoraConfig | None
    """Adapters of a model that is frozen else; None: all weights are trained."""

    def keeps_input_of(self, layer: str) -> bool:
        """Whether a product's input is kept for the gradient of its weight, or of A."""
        return self.lora is None or layer in self.lora.targets

    @property
    def fused_qkv(self) -> float:
        """Columns of the output of the projection to queries, keys and values."""
        return self.query + 2 * self.key


def widths(
    shape: ModelShape,
    parallel: ParallelConfig,
    element: int,
    layers: Layers,
    lora: LoraConfig | None = None,
) -> Widths:
    """The columns one rank has.

    Args:
        element: bytes of an element: 2 for bfloat16, 4 for float32.
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
        gathered=1 if layers == "transformer_engine" else parallel.context,
        shape=shape,
        element=element,
        layers=layers,
        lora=lora,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that the passes of a stage need."""

    kept: float
    """Saved tensors, most at a time, those on the host left out."""
    recomputed: float
    """Saved tensors of what is computed again together, while its gradients are taken."""
    on_host: float
    """Saved tensors that wait there."""


def saved_per_position(w: Widths) -> float:
    """Bytes of one layer for one position: attention, MLP or mixture, two norms."""
    return _first_norm(w) + _second_norm(w) + _attention(w) + _transformed(w)


def kept_per_position(w: Widths, recompute: Recompute) -> float:
    """The same if modules are recomputed (``recompute_granularity = "selective"``)."""
    if recompute.method != "selective":
        return saved_per_position(w)
    modules = recompute.modules
    first, second, transformed = _first_norm(w), _second_norm(w), _transformed(w)
    attention = _attention(w, recomputed="core_attn" in modules)
    if "layernorm" in modules:  # TE's norms belong to the products, save the one before a mixture
        first = first if _fused_norm(w) else _input(w)
        second = second if _fused_norm(w) and not w.shape.experts else _input(w)
    if ("moe" if w.shape.experts else "mlp") in modules:
        transformed = 0.0
        second = _input(w) if _fused_norm(w) and not w.shape.experts else second
    elif "moe_act" in modules and w.shape.experts and w.layers == "transformer_engine":
        transformed -= w.shape.experts.per_token * w.ffn * w.element
    return first + attention + second + transformed


def activations(run: PlannedRun, stage: int) -> Activations:
    """What a rank of a stage holds of the student's passes, most at a time."""
    p, work = run.parallel, run.work
    w = widths(run.student.shape, p, run.element, run.hardware.layers, run.lora)
    chunks = stage_chunks(w.shape.layers, p.pipeline, p.virtual_pipeline)[stage]
    each = [_of_chunk(run, w, stage, number, len(c)) for number, c in enumerate(chunks)]
    flying = in_flight(p.pipeline, p.virtual_pipeline, stage, work.most_micro_batches)

    def held(counts: tuple[int, ...]) -> float:
        return sum(count * kept for count, (kept, _) in zip(counts, each, strict=True))

    most = max(flying, key=held)
    away = work.rank_positions * _offloaded(w, run.options.offload)
    away *= _layers_away(run.options, [len(c) for c in chunks], most)
    return Activations(held(most) - away, max(again for _, again in each), away)


@lru_cache(maxsize=256)
def in_flight(stages: int, chunks: int, stage: int, micro_batches: int) -> list[tuple[int, ...]]:
    """Micro-batches of each chunk of a stage that wait for their backward pass, at its fullest.

    Without virtual stages (one chunk) the schedule is 1F1B: stage i of p begins the backward pass
    of its first micro-batch when it has p - i of them in flight. With v chunks it is Megatron's
    interleaved one: p micro-batches go through a chunk, then through the next, and the first
    backward pass, that of the last chunk, begins after 2 (p - i - 1) + (v - 1) p + 1 forward
    passes. What is in flight is then the same again every p v passes.

    Returns:
        Of every moment at which as many passes are in flight as ever.
    """
    if chunks == 1:
        return [(min(stages - stage, micro_batches),)]
    passes = chunks * min(micro_batches, 4 * stages)
    of_pass = [number // stages % chunks for number in range(passes)]
    ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, passes)
    counts = [of_pass[:ahead].count(chunk) for chunk in range(chunks)]
    moments = [tuple(counts)]
    for backward, forward in enumerate(range(ahead, passes)):
        counts[chunks - 1 - of_pass[backward]] -= 1
        counts[of_pass[forward]] += 1
        moments.append(tuple(counts))
    return moments


def _of_chunk(
    run: PlannedRun, w: Widths, stage: int, number: int, layers: int
) -> tuple[float, float]:
    """:func:`_layers_kept` of a chunk, with what lies before the first layer and after the last."""
    p, work = run.parallel, run.work
    positions, length = work.rank_positions, work.longest // work.shares
    kept, again = _layers_kept(w, run.options.recompute, layers, positions, length)
    if (stage, number) == (0, 0) and w.lora is None:
        kept += 8 * positions  # the ids, for the embedding
    if (stage, number) == (p.pipeline - 1, p.virtual_pipeline - 1):
        kept += positions * _final(w)
        again = max(0.0, again - positions * _final(w))  # which is gone by then
    return kept, again


def _layers_kept(
    w: Widths, recompute: Recompute, layers: int, positions: int, length: int
) -> tuple[float, float]:
    """Of one micro-batch: bytes that stay, and how many more there are at the worst moment."""
    whole, unit = recompute.whole_layers(layers), recompute.unit(layers)
    tables = length * _rotary_tables(w)
    one = positions * saved_per_position(w) + tables
    if not whole:
        kept = positions * kept_per_position(w, recompute) + tables
        return layers * kept, positions * _made_again(w, recompute)
    start = positions * _input(w)
    if recompute.distributed:
        start *= w.heads / w.shape.heads
    angles = length * w.head_dim * _FLOAT32
    kept = -(-whole // unit) * start + angles + (layers - whole) * one
    again = unit * one - (layers - whole) * one  # the other layers are through by then
    # The first norm's input is the unit's, unless a CPU makes a float32 copy of it.
    copied = w.layers == "cpu" and w.element == 2
    again -= 0 if copied or recompute.distributed else start
    if whole % unit and whole > unit:
        again -= start  # of the smaller unit at the end
    return kept, max(0.0, again)


def _made_again(w: Widths, recompute: Recompute) -> float:
    """Bytes for one position while modules of one layer are recomputed, one after the other.

    By the time of core attention more than it needs is gone, of the MLP.
    """
    experts = w.shape.experts
    inner = 0.0 if experts or not _fused_norm(w) else _norm(w) - _input(w)
    activation = experts.per_token * w.ffn * w.element if experts and _fused_norm(w) else 0.0
    sizes = {
        "mlp": 0.0 if experts else inner + _transformed(w),
        "moe": _transformed(w) if experts else 0.0,
        "moe_act": activation,
        "layernorm": 0.0 if _fused_norm(w) and not experts else _norm(w) - _input(w),
    }
    return max((sizes.get(module, 0.0) for module in recompute.modules), default=0.0)


def _offloaded(w: Widths, modules: frozenset[str]) -> float:
    """Bytes of one layer and position that go to the host; tensors on a CPU never do.

    Of the projection to queries, keys and values nothing is freed if norms of heads keep it.
    """
    if w.layers == "cpu":
        return 0.0
    fused, experts = _fused_norm(w), w.shape.experts
    routes = experts.per_token if experts and fused else 0
    columns = {
        "attn_norm": 0.0 if fused else w.sharded_hidden,
        "mlp_norm": 0.0 if fused and not experts else w.sharded_hidden,
        "qkv_linear": w.sharded_hidden * (2 if fused else 1),
        "core_attn": w.query + w.key + (0.0 if w.shape.qk_norm else w.fused_qkv),
        "attn_proj": w.query,
        "expert_fc1": routes * w.routed_hidden,
        "moe_act": routes * 2 * w.ffn,
        "fused_group_mlp": routes * (w.routed_hidden + 3 * w.ffn),
    }
    return w.element * sum(columns.get(module, 0.0) for module in modules)


def _layers_away(options: Options, layers: Sequence[int], flying: Sequence[int]) -> float:
    """Layers, of all micro-batches in flight, whose offloaded tensors are on the host at a time.

    The layer that is needed next is back, and the one before it on its way.

    Args:
        layers: of each chunk.
        flying: micro-batches of each.
    """
    eligible = sum(
        count * (each - options.recompute.whole_layers(each))
        for each, count in zip(layers, flying, strict=True)
    )
    return max(0.0, eligible - 2) * options.offload_fraction


def _one_norm(w: Widths, columns: float, groups: float = 1) -> float:
    """What a norm keeps beside its output, which belongs to the product that follows."""
    if w.layers == "cpu":  # torch composes it: the input and the normalised input, in float32
        kept = 2 if w.lora is None else 1  # the second is for the gradient of its weight
        return kept * columns * 4 + groups * _STATISTIC
    return columns * w.element + groups * _STATISTIC


def _input(w: Widths) -> float:
    """The residual stream, or the output of a norm."""
    return w.sharded_hidden * w.element


def _norm(w: Widths) -> float:
    """A norm and its output, which the product after it keeps."""
    return _one_norm(w, w.sharded_hidden) + _input(w)


def _first_norm(w: Widths) -> float:
    return _norm(w) - (0.0 if w.keeps_input_of("linear_qkv") else _input(w))


def _second_norm(w: Widths) -> float:
    """Before the MLP; a mixture's router keeps its output in any case."""
    kept = bool(w.shape.experts) or w.keeps_input_of("linear_fc1")
    return _norm(w) - (0.0 if kept else _input(w))


def _fused_norm(w: Widths) -> bool:
    """Whether a norm is part of the product that follows it."""
    return w.layers == "transformer_engine"


def _transformed(w: Widths) -> float:
    return _mixture(w, w.shape.experts) if w.shape.experts else _mlp(w)


def _attention(w: Widths, *, recomputed: bool = False) -> float:
    """Queries, keys, values, output (the projection's input too), logarithms of the sums.

    A value is a view of the fused projection and keeps all of it, unless keys and values
    are repeated for every query head, as a CPU's kernels need them. Recomputation begins from
    queries, keys and values as they were before. Gathered keys and values are copies, and the
    output of two chunks is put together once more.
    """
    repeats = w.shape.heads > w.shape.kv_heads and w.layers == "cpu" and not recomputed
    kept = 4 * w.query if repeats else 2 * w.query + w.key + w.fused_qkv
    gathers = w.gathered > 1 and not recomputed
    if gathers:
        # Repeated for each chunk: all of the row for one, and what lies before it for the other.
        whole = w.query * (w.gathered + 0.5) if repeats else w.key * w.gathered
        kept = 3 * w.query + 2 * whole
    sums = 0.0 if recomputed else w.heads * _STATISTIC
    adapters = _adapter(w, "linear_qkv", w.sharded_hidden) + _adapter(w, "linear_proj", w.query)
    if w.keeps_input_of("linear_proj") and w.lora is not None and w.lora.dropout:
        kept += w.query  # beside the output of attention, what is left of it
    norms = _qk_norms(w, projection_is_kept=not repeats and not gathers)
    return kept * w.element + sums + norms + adapters


def _qk_norms(w: Widths, *, projection_is_kept: bool) -> float:
    if not w.shape.qk_norm:
        return 0.0
    statistics = (w.heads + w.kv_heads) * _STATISTIC
    trained = w.lora is None  # else a norm's weight needs no normalised input
    if w.layers == "cpu" and w.element == 2:  # inputs become float32 copies
        return (1 + trained) * (w.query + w.key) * 4 + statistics
    normalised = (w.query + w.key) * w.element if w.layers == "cpu" and trained else 0.0
    # Of several groups the queries are copied out of the fused projection; a key is a view of it.
    copied = w.query if w.kv_heads > 1 else 0.0
    inputs = copied + (0.0 if projection_is_kept else w.fused_qkv)
    return inputs * w.element + normalised + statistics


def _mlp(w: Widths) -> float:
    """Output of the first product, what the activation keeps of it, input of the second."""
    columns = 5 if w.layers == "cpu" else 3  # unfused, the activation keeps both factors
    columns -= not w.keeps_input_of("linear_fc2")
    adapters = _adapter(w, "linear_fc1", w.sharded_hidden) + _adapter(w, "linear_fc2", w.ffn)
    return columns * w.ffn * w.element + adapters


def _adapter(w: Widths, layer: str, columns: float) -> float:
    """An adapter's own: A x for the gradient of B, and a mask if inputs are dropped.

    Beside sharded rows A x is that of all positions. ``columns``: those of x.
    """
    if w.lora is None or layer not in w.lora.targets:
        return 0.0
    dense = w.shape.experts is None or layer not in OF_EXPERTS
    sharded = w.sharded_hidden / w.hidden if dense and layer not in COLUMN_PARALLEL else 1.0
    mask = w.element if w.layers == "cpu" else 1
    return sharded * w.lora.rank * w.element + (columns * mask if w.lora.dropout else 0.0)


def _mixture(w: Widths, experts: Experts) -> float:
    """The same for k routed copies of each position, the router, and the routes.

    Routes are taken as even: every rank gets as many tokens as it sends. Each rank of a
    tensor-parallel group sees all tokens routed to it, with its share of every expert's columns;
    with whole experts its share of the tokens, with all columns.
    """
    columns = 6 if w.layers == "cpu" else 3
    columns -= not w.keeps_input_of("linear_fc2")
    routed = w.routed_hidden if w.keeps_input_of("linear_fc1") else 0.0
    adapters = _adapter(w, "linear_fc1", routed) + _adapter(w, "linear_fc2", w.ffn)
    one = (routed + columns * w.ffn) * w.element + adapters
    routing = experts.per_token * _PER_ROUTE + experts.count * _STATISTIC
    return experts.per_token * one + routing * w.sharded_hidden / w.hidden


def _rotary_tables(w: Widths) -> float:
    """Cosines and sines of queries and of keys, once for all rows."""
    return 4 * w.head_dim * w.element


def _final(w: Widths) -> float:
    """The last norm's input; its output becomes the hidden states of the loss tokens."""
    return _one_norm(w, w.sharded_hidden) + 1
