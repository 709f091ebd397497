"""Bytes that one GPU sends in one optimizer step, by what they are for.

Rings: an all-reduce of n bytes over r ranks sends 2 n (r - 1) / r, a reduce-scatter or an
all-gather half of that.
"""

from dataclasses import dataclass

from megatron_tropd.convert.adapters import COLUMN_PARALLEL, OF_EXPERTS
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.planning.parameters import PlannedModel
from megatron_tropd.planning.planned_run import PlannedRun

_FLOAT32 = 4


@dataclass(frozen=True)
class Communication:
    """Bytes sent by one GPU of the busiest stage in one step."""

    tensor_teacher: float
    """Sums over the tensor-parallel group, teacher's forward pass."""
    tensor_student: float
    context_teacher: float
    """Keys and values to the ranks that share rows."""
    context_student: float
    """The same and their gradients."""
    expert_teacher: float
    """Tokens to their experts and back."""
    expert_student: float
    pipeline_teacher: float
    """Hidden states to the next stage."""
    pipeline_student: float
    """The same and their gradients."""
    data: float
    """Gradients summed over the replicas, and the distributed optimizer's new weights."""
    tied_embedding: float
    """Gradients of a tied embedding, between its first stage and its last."""
    weight_sync: float
    """The student, to a colocated engine's GPU; or written and read, in shared memory or, for
    separate engines, in the run's folder."""


def communication(run: PlannedRun) -> Communication:
    """What each kind of parallelism sends."""
    student, own = run.student, run.scoring
    share = 1 / len(run.teachers)  # of the rows
    scoring = [m for t in run.teachers if t.gives_states for m in t.named]
    # A loss that looks at the student first takes one more pass.
    passes = 2 + run.config.loss.needs_student_pass
    again = repeated(run)
    ways = 2 if run.through_folder else 1
    return Communication(
        tensor_teacher=sum(tensor_bytes(own, model, passes=share) for model in scoring),
        tensor_student=tensor_bytes(run, student, passes=passes - 2 + student_sums(run))
        + adapter_bytes(run, passes=passes - 2 + repeated(run).sums),
        context_teacher=sum(context_bytes(own, model, passes=share) for model in scoring),
        context_student=context_bytes(run, student, passes=passes + again.attention),
        expert_teacher=sum(sum(expert_bytes(own, model, passes=share)) for model in scoring),
        expert_student=sum(expert_bytes(run, student, passes=passes + again.routes)),
        pipeline_teacher=sum(pipeline_bytes(own, model, passes=share) for model in scoring),
        pipeline_student=pipeline_bytes(run, student, passes=passes),
        data=max(data_bytes(run, stage) for stage in {0, run.last_stage}),
        tied_embedding=tied_embedding_bytes(run),
        weight_sync=float(ways * student.parameters * run.element),
    )


@dataclass(frozen=True)
class Repeated:
    """Shares of a forward pass that recomputation takes once more."""

    layers: float
    """Of the layers, whole."""
    sums: float
    """Of the collectives over the tensor-parallel group."""
    routes: float
    """Of the tokens' ways to their experts and back."""
    attention: float
    """Of the keys' and values' ways to the ranks that share rows."""


def repeated(run: PlannedRun) -> Repeated:
    """What the options have the student's backward pass do again, on the first stage."""
    recompute = run.options.recompute
    p = run.parallel
    chunks = stage_chunks(run.student.shape.layers, p.pipeline, p.virtual_pipeline)[0]
    whole = sum(recompute.whole_layers(len(c)) for c in chunks) / sum(map(len, chunks))
    experts = run.student.shape.experts is not None
    mlp = 0.5 if "mlp" in recompute.modules and not experts else 0.0  # one of two sums
    routes = 1.0 if "moe" in recompute.modules and experts else 0.0
    attention = 1.0 if "core_attn" in recompute.modules else whole
    return Repeated(layers=whole, sums=whole + mlp, routes=whole + routes, attention=attention)


def student_sums(run: PlannedRun) -> float:
    """Forward passes whose collectives equal those of the student's forward and backward."""
    # Sharded inputs are gathered once more for the gradient of weights that are trained.
    gathered = run.parallel.sequence_parallel and run.lora is None
    return 2 + repeated(run).sums + (0.5 if gathered else 0)


def tensor_bytes(run: PlannedRun, model: PlannedModel, *, passes: float) -> float:
    """Two all-reduces (or pairs of gather and scatter) of the hidden states in every layer.

    A mixture's second one is part of :func:`expert_bytes`.
    """
    t = run.parallel.tensor
    layers = -(-model.shape.layers // run.parallel.pipeline)
    one = run.work.positions * model.shape.hidden * run.element
    sums = 1 if model.shape.experts else 2
    return passes * layers * sums * 2 * one * (t - 1) / t


def adapter_bytes(run: PlannedRun, *, passes: float) -> float:
    """What goes between A and B of the adapters: rank columns, once a target, there or back.

    Of rows that are sharded the gradient is summed, of columns the product; under sequence
    parallelism it is gathered and scattered, which sends as much.

    Args:
        passes: forward passes beside the student's own.
    """
    if run.lora is None:
        return 0.0
    t = run.parallel.tensor
    layers = -(-run.student.shape.layers // run.parallel.pipeline)
    experts = OF_EXPERTS if run.student.shape.experts else ()
    dense = [name for name in run.lora.targets if name not in experts]
    forward = [name for name in dense if name not in COLUMN_PARALLEL]
    one = run.work.positions * run.lora.rank * run.element * 2 * (t - 1) / t
    return layers * one * (len(dense) + passes * len(forward))


def context_bytes(run: PlannedRun, model: PlannedModel, *, passes: float) -> float:
    """Every rank's keys and values to the others that share its rows, in every layer."""
    p, shape = run.parallel, model.shape
    layers = -(-shape.layers // p.pipeline)
    columns = 2 * shape.kv_heads * shape.head_dim / p.tensor
    return passes * layers * run.work.positions * columns * run.element * (p.context - 1)


def expert_bytes(run: PlannedRun, model: PlannedModel, *, passes: float) -> tuple[float, float]:
    """Routed tokens there and back: (over the expert-parallel ranks, over the tensor ones).

    An all-to-all over the first, where a rank has its part of the sequence; a gather and a scatter
    over the second if experts are sharded there too (``parallel.expert_tensor``).
    """
    experts = model.shape.experts
    if experts is None:
        return 0.0, 0.0
    e, t = run.parallel.expert, run.parallel.tensor
    layers = -(-model.shape.layers // run.parallel.pipeline)
    routed = run.work.positions * experts.per_token * model.shape.hidden * run.element
    there_and_back = passes * layers * 2 * routed
    shards = run.parallel.shards_of_expert
    return there_and_back / t * (e - 1) / e, there_and_back / t * (shards - 1)


def pipeline_bytes(run: PlannedRun, model: PlannedModel, *, passes: float) -> float:
    """Hidden states of every position across the boundary of each chunk.

    Sharded under sequence parallelism.
    """
    p = run.parallel
    if p.pipeline == 1:
        return 0.0
    shards = p.tensor if p.sequence_parallel else 1
    one = run.work.positions * model.shape.hidden * run.element / shards
    return passes * p.virtual_pipeline * one


def data_bytes(run: PlannedRun, stage: int) -> float:
    """Gradients over the replicas; with the distributed optimizer, new weights back."""
    held, p = run.trained_of(stage), run.parallel
    return _reduced(run, held.dense, p.replicas) + _reduced(run, held.experts, p.expert_replicas)


def tied_embedding_bytes(run: PlannedRun) -> float:
    """One float32 all-reduce of the embedding's shard over two ranks."""
    shape, p = run.student.shape, run.parallel
    if not shape.tied or p.pipeline == 1 or run.lora:
        return 0.0
    return float(_FLOAT32 * run.vocab_shard * shape.hidden)


def _reduced(run: PlannedRun, parameters: int, replicas: int) -> float:
    ring = (replicas - 1) / replicas
    if run.parallel.distributed_optimizer:
        return parameters * (run.gradient_element + run.element) * ring
    return 2 * parameters * run.gradient_element * ring
