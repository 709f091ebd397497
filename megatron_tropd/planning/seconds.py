"""Expected seconds of each phase of a step, from rates that the hardware is said to reach.

Estimates: products at a fixed share of the peak, collectives not hidden behind them, evenly routed
experts, no evaluation and no checkpoint.
"""

from dataclasses import dataclass

from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.planning.communication import (
    Communication,
    expert_bytes,
    pipeline_bytes,
    tensor_bytes,
)
from megatron_tropd.planning.memory import cache_bytes_per_token, cache_tokens, engine_memory
from megatron_tropd.planning.parameters import Model
from megatron_tropd.planning.setup import Setup

MOST_SEQUENCES = 256
"""Sequences an engine decodes together without ``rollout.max_num_seqs``: vLLM's default on a CPU
and on smaller GPUs. It is 1024 on large ones, which the estimate leaves out."""


@dataclass(frozen=True)
class Seconds:
    """Of the phases that a run's metrics report under the same names."""

    rollout: float
    """Until all samples are there; separate engines load new weights first."""
    teacher: float
    student: float
    """Forward, loss, backward, gradients over the replicas."""
    optimizer: float
    sync: float
    """New weights into colocated engines, or into the folder where separate ones find them."""
    overlapped: bool
    """Whether the rollout goes on beside the rest: separate engines, one step ahead."""
    sync_waits: bool = False
    """Whether the weights wait for all samples, as those do that go directly."""

    @property
    def training(self) -> float:
        """All phases but the rollout."""
        return self.teacher + self.student + self.optimizer + self.sync

    @property
    def waiting(self) -> float:
        """For samples: the whole rollout, or what is left of it after all that goes on beside."""
        if not self.overlapped:
            return self.rollout
        beside = self.training - self.sync if self.sync_waits else self.training
        return max(0.0, self.rollout - beside)

    @property
    def total(self) -> float:
        """Of one step."""
        return self.waiting + self.training


def seconds(made: Setup, sent: Communication) -> Seconds:
    """Every phase of one step.

    Args:
        made: the run.
        sent: its communication.
    """
    student = pass_seconds(made, made.student, backward=True) + _reduction_seconds(made, sent)
    if made.config.loss.needs_student_pass:
        student += pass_seconds(made, made.student, backward=False)
    return Seconds(
        rollout=rollout_seconds(made),
        teacher=pass_seconds(made, made.teacher, backward=False),
        student=student,
        optimizer=optimizer_seconds(made),
        sync=sync_seconds(made),
        overlapped=made.separate and made.rollout.steps_ahead == 1,
        sync_waits=made.direct,
    )


def layer_flops(model: Model, positions: float, length: float) -> float:
    """Of one layer's forward pass, all tensor-parallel ranks together.

    Two for each parameter a position is multiplied with; causal attention of 2 x 2 x length / 2
    for each query column, or of the window where that is shorter.
    """
    shape = model.shape
    windows = shape.windows or (None,) * shape.layers
    seen = sum(min(length / 2, w or length) for w in windows) / shape.layers
    products = 2 * model.active / shape.layers
    return positions * (products + 4 * shape.heads * shape.head_dim * seen)


def layer_seconds(made: Setup, model: Model, positions: float) -> float:
    """Of one layer's forward pass on one GPU; experts' products are slower."""
    experts = 2 * positions * model.active_experts / model.shape.layers
    others = layer_flops(model, positions, made.work.mean) - experts
    return others / made.hardware.flops + experts / made.hardware.expert_flops


def loss_flops(made: Setup, tokens: float) -> float:
    """Logits of both models, gradients of the student's hidden states and output layer."""
    student, teacher = made.student.shape.hidden, made.teacher.shape.hidden
    return 2 * tokens * made.padded_vocab * (3 * student + teacher)


def pass_seconds(made: Setup, model: Model, *, backward: bool) -> float:
    """A pipeline's passes over all micro-batches: (m + p - 1) times the slowest stage.

    Args:
        made: the run.
        model: which of the pair.
        backward: with backward pass (twice the products of the forward) and loss.
    """
    p, work, hardware = made.parallel, made.work, made.hardware
    m = work.micro_batches
    stages = stage_sizes(model.shape.layers, p.pipeline)
    one_layer = layer_seconds(made, model, work.positions / m)
    products = [(3 if backward else 1) * layers * one_layer for layers in stages]
    if backward:
        products[-1] += loss_flops(made, work.loss_tokens / m) / hardware.flops
    passes = (2.5 if p.sequence_parallel else 2) if backward else 1
    return (m + p.pipeline - 1) * (max(products) / p.tensor + _talk(made, model, passes) / m)


def _talk(made: Setup, model: Model, passes: float) -> float:
    """Seconds of the collectives of one stage and all micro-batches."""
    p, hardware = made.parallel, made.hardware
    exchanged, gathered = expert_bytes(made, model, passes=min(passes, 2))
    summed = tensor_bytes(made, model, passes=passes) + gathered
    across = pipeline_bytes(made, model, passes=min(passes, 2))
    return (
        summed / hardware.link(p.tensor)
        + exchanged / hardware.link(p.shards_of_expert * p.expert)
        + across / hardware.link(p.world_size)
    )


def _reduction_seconds(made: Setup, sent: Communication) -> float:
    # The distributed optimizer's share for new weights belongs to the optimizer; it is small and
    # goes over the same links, so it is counted here.
    p, hardware = made.parallel, made.hardware
    over_replicas = sent.data / hardware.link(p.tensor * p.data)
    return over_replicas + sent.tied_embedding / hardware.link(p.world_size)


def optimizer_seconds(made: Setup) -> float:
    """Adam reads gradient, weight and two moments, writes the last three and the bfloat16 weight.

    Before it, gradients are cleared and their norm is taken.
    """
    held, p = made.held(made.student, 0), made.parallel
    updated = float(held.total)
    if p.distributed_optimizer:
        updated = held.dense / p.data + held.experts / p.expert_replicas
    return (8 * held.total + 30 * updated) / made.hardware.memory_bandwidth


def rollout_seconds(made: Setup) -> float:
    """Prompts, then one decoding step for each token, waves of sequences after one another.

    A decoding step reads the weights (of a mixture, the experts that some sequence needs) and
    the keys and values of all sequences, or multiplies, whichever takes longer, and then waits
    for two collectives a layer where the engine has several GPUs.
    """
    hardware, gpus = made.hardware, made.rollout.engine_tensor_parallel
    sequences = -(-made.work.trajectories // made.rollout.num_engines)
    together = concurrent_sequences(made)
    waves = max(1.0, sequences / together)
    matrices = 2 * (made.student.active + made.padded_vocab * made.student.shape.hidden)
    middle = made.work.prompt + made.work.mean_response / 2
    cache = together * middle * cache_bytes_per_token(made)
    read = (_weights_read(made, together) / gpus + cache) / hardware.memory_bandwidth
    multiply = together * matrices / gpus / hardware.flops
    one_step = max(read, multiply) + hardware.decode_overhead_ms / 1e3
    if gpus > 1:
        one_step += 2 * made.student.shape.layers * hardware.hop_us / 1e6
    prompts = sequences * made.work.prompt * 2 * made.student.active / gpus / hardware.flops
    return _arrival_seconds(made) + prompts + waves * made.work.mean_response * one_step


def concurrent_sequences(made: Setup) -> int:
    """Sequences an engine decodes together: its own limit, its work, its cache."""
    mine = -(-made.work.trajectories // made.rollout.num_engines)
    room = int(cache_tokens(made) // (made.work.prompt + made.work.mean_response))
    return max(1, min(made.rollout.max_num_seqs or MOST_SEQUENCES, mine, room))


def sync_seconds(made: Setup) -> float:
    """New weights on their way, one process writing.

    Colocated: the engine wakes with its old weights, the new ones are written into shared memory
    and read. Separate: they are written into the run's folder. Directly: one GPU sends them once,
    after a copy to the host, which is written while the next step trains.
    """
    weights, hardware = made.student.parameters * made.element, made.hardware
    if made.direct:
        network = hardware.network_gb_s * hardware.achieved_bandwidth
        return weights / (network * 1e9) + weights / (hardware.host_copy_gb_s * 1e9)
    if made.separate:
        return weights / (hardware.shared_folder_gb_s * 1e9)
    return (2 * weights + _offloaded_bytes(made)) / (hardware.host_copy_gb_s * 1e9)


def _arrival_seconds(made: Setup) -> float:
    """Weights of an engine on the move beside :func:`sync_seconds`.

    Separate: new ones are read from the run's folder, unless they came directly. Colocated: those
    of an engine that falls asleep are copied to the host.
    """
    if made.direct:
        return 0.0
    if made.separate:
        bandwidth = made.hardware.shared_folder_gb_s * 1e9
        return made.student.parameters * made.element / bandwidth
    return _offloaded_bytes(made) / (made.hardware.host_copy_gb_s * 1e9)


def _offloaded_bytes(made: Setup) -> float:
    """What a sleeping engine keeps in the host's memory, of each of its GPUs."""
    return 0.0 if made.hardware.layers == "cpu" else engine_memory(made).weights


def _weights_read(made: Setup, sequences: int) -> float:
    """Bytes of weights that a decoding step needs; experts that no sequence chose stay unread."""
    student, experts = made.student, made.student.shape.experts
    read = float(student.parameters)
    if experts is not None:
        read -= student.in_experts * (1 - experts.per_token / experts.count) ** sequences
    return read * made.element
