"""Bytes that one GPU sends in one optimizer step, by what they are for.

Rings: an all-reduce of n bytes over r ranks sends 2 n (r - 1) / r, a reduce-scatter or an
all-gather half of that.
"""

from dataclasses import dataclass

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
    weight_sync: float
    """The student as an engine reads it; through shared memory."""


def communication(made: Setup) -> Communication:
    """What each kind of parallelism sends."""
    student, teacher = made.student, made.teacher
    # Sharded inputs are gathered once more for the gradient of the weights.
    passes = 2.5 if made.parallel.sequence_parallel else 2
    return Communication(
        tensor_teacher=tensor_bytes(made, teacher, passes=1),
        tensor_student=tensor_bytes(made, student, passes=passes),
        expert_teacher=expert_bytes(made, teacher, passes=1),
        expert_student=expert_bytes(made, student, passes=2),
        pipeline_teacher=pipeline_bytes(made, teacher, passes=1),
        pipeline_student=pipeline_bytes(made, student, passes=2),
        data=max(data_bytes(made, s) for s in range(made.parallel.pipeline)),
        weight_sync=2.0 * student.parameters * made.element,
    )


def tensor_bytes(made: Setup, model: Model, *, passes: float) -> float:
    """Two all-reduces (or pairs of gather and scatter) of the hidden states in every layer.

    A mixture's second one is part of :func:`expert_bytes`.
    """
    t = made.parallel.tensor
    layers = -(-model.shape.layers // made.parallel.pipeline)
    one = made.work.positions * model.shape.hidden * made.element
    sums = 1 if model.shape.experts else 2
    return passes * layers * sums * 2 * one * (t - 1) / t


def expert_bytes(made: Setup, model: Model, *, passes: float) -> float:
    """Routed tokens there and back over the expert-parallel ranks, and over the tensor ones."""
    experts = model.shape.experts
    if experts is None:
        return 0.0
    e, t = made.parallel.expert, made.parallel.tensor
    layers = -(-model.shape.layers // made.parallel.pipeline)
    routed = made.work.positions * experts.per_token * model.shape.hidden * made.element
    there = routed / t * (e - 1) / e + routed * (t - 1) / t
    return passes * layers * 2 * there


def pipeline_bytes(made: Setup, model: Model, *, passes: float) -> float:
    """Hidden states of every position across one boundary; sharded under sequence parallelism."""
    if made.parallel.pipeline == 1:
        return 0.0
    shards = made.parallel.tensor if made.parallel.sequence_parallel else 1
    return passes * made.work.positions * model.shape.hidden * made.element / shards


def data_bytes(made: Setup, stage: int) -> float:
    """Float32 gradients over the replicas; with the distributed optimizer, new weights back."""
    held, p = made.held(made.student, stage), made.parallel
    return _reduced(made, held.dense, p.data) + _reduced(made, held.experts, p.data // p.expert)


def _reduced(made: Setup, parameters: int, replicas: int) -> float:
    ring = (replicas - 1) / replicas
    if made.parallel.distributed_optimizer:
        return parameters * (_FLOAT32 + made.element) * ring
    return 2 * parameters * _FLOAT32 * ring
