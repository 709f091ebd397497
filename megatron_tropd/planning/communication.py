"""Bytes that one GPU sends in one optimizer step, by what they are for.

Rings: an all-reduce of n bytes over r ranks sends 2 n (r - 1) / r, a reduce-scatter or an
all-gather half of that.
"""

from dataclasses import dataclass

from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.planning.parameters import Model
from megatron_tropd.planning.setup import Setup

_FLOAT32 = 4


@dataclass(frozen=True)
class Communication:
    """Bytes sent by one GPU of the busiest stage in one step."""

    tensor_teacher: float
    """Sums over the tensor-parallel group, teacher's forward pass."""
    tensor_student: float
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


def communication(made: Setup) -> Communication:
    """What each kind of parallelism sends."""
    student, frozen = made.student, made.frozen
    # A loss that looks at the student first takes one more pass.
    passes = 2 + made.config.loss.needs_student_pass
    again = repeated(made)
    ways = 2 if made.through_folder else 1
    return Communication(
        tensor_teacher=sum(tensor_bytes(made, model, passes=1) for model in frozen),
        tensor_student=tensor_bytes(made, student, passes=passes - 2 + student_sums(made)),
        expert_teacher=sum(sum(expert_bytes(made, model, passes=1)) for model in frozen),
        expert_student=sum(expert_bytes(made, student, passes=passes + again.routes)),
        pipeline_teacher=sum(pipeline_bytes(made, model, passes=1) for model in frozen),
        pipeline_student=pipeline_bytes(made, student, passes=passes),
        data=max(data_bytes(made, stage) for stage in {0, made.last_stage}),
        tied_embedding=tied_embedding_bytes(made),
        weight_sync=float(ways * student.parameters * made.element),
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


def repeated(made: Setup) -> Repeated:
    """What the options have the student's backward pass do again, on the first stage."""
    recompute = made.options.recompute
    layers = stage_sizes(made.student.shape.layers, made.parallel.pipeline)[0]
    whole = recompute.whole_layers(layers) / layers
    experts = made.student.shape.experts is not None
    mlp = 0.5 if "mlp" in recompute.modules and not experts else 0.0  # one of two sums
    routes = 1.0 if "moe" in recompute.modules and experts else 0.0
    return Repeated(layers=whole, sums=whole + mlp, routes=whole + routes)


def student_sums(made: Setup) -> float:
    """Forward passes whose collectives equal those of the student's forward and backward."""
    # Sharded inputs are gathered once more for the gradient of the weights.
    return 2 + repeated(made).sums + (0.5 if made.parallel.sequence_parallel else 0)


def tensor_bytes(made: Setup, model: Model, *, passes: float) -> float:
    """Two all-reduces (or pairs of gather and scatter) of the hidden states in every layer.

    A mixture's second one is part of :func:`expert_bytes`.
    """
    t = made.parallel.tensor
    layers = -(-model.shape.layers // made.parallel.pipeline)
    one = made.work.positions * model.shape.hidden * made.element
    sums = 1 if model.shape.experts else 2
    return passes * layers * sums * 2 * one * (t - 1) / t


def expert_bytes(made: Setup, model: Model, *, passes: float) -> tuple[float, float]:
    """Routed tokens there and back: (over the expert-parallel ranks, over the tensor ones).

    An all-to-all over the first, where a rank has its part of the sequence; a gather and a scatter
    over the second where experts are sharded there too (``parallel.expert_tensor``).
    """
    experts = model.shape.experts
    if experts is None:
        return 0.0, 0.0
    e, t = made.parallel.expert, made.parallel.tensor
    layers = -(-model.shape.layers // made.parallel.pipeline)
    routed = made.work.positions * experts.per_token * model.shape.hidden * made.element
    there_and_back = passes * layers * 2 * routed
    shards = made.parallel.shards_of_expert
    return there_and_back / t * (e - 1) / e, there_and_back / t * (shards - 1)


def pipeline_bytes(made: Setup, model: Model, *, passes: float) -> float:
    """Hidden states of every position across one boundary; sharded under sequence parallelism."""
    if made.parallel.pipeline == 1:
        return 0.0
    shards = made.parallel.tensor if made.parallel.sequence_parallel else 1
    return passes * made.work.positions * model.shape.hidden * made.element / shards


def data_bytes(made: Setup, stage: int) -> float:
    """Gradients over the replicas; with the distributed optimizer, new weights back."""
    held, p = made.held(made.student, stage), made.parallel
    return _reduced(made, held.dense, p.data) + _reduced(made, held.experts, p.expert_replicas)


def tied_embedding_bytes(made: Setup) -> float:
    """One float32 all-reduce of the embedding's shard over two ranks."""
    shape, p = made.student.shape, made.parallel
    if not shape.tied or p.pipeline == 1:
        return 0.0
    return float(_FLOAT32 * made.vocab_shard * shape.hidden)


def _reduced(made: Setup, parameters: int, replicas: int) -> float:
    ring = (replicas - 1) / replicas
    if made.parallel.distributed_optimizer:
        return parameters * (made.gradient_element + made.element) * ring
    return 2 * parameters * made.gradient_element * ring
