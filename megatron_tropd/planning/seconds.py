"""Expected seconds of each phase of a step, from rates that the hardware is said to reach.

Estimates: products at a fixed share of the peak, collectives not hidden behind them, evenly routed
experts, no evaluation and no checkpoint.
"""

from dataclasses import dataclass

from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.planning.activations import activations
from megatron_tropd.planning.communication import (
    Communication,
    context_bytes,
    expert_bytes,
    pipeline_bytes,
    repeated,
    student_sums,
    tensor_bytes,
)
from megatron_tropd.planning.memory import (
    cache_bytes_per_token,
    cache_tokens,
    offloaded_parameters,
    updated_parameters,
    visiting_bytes,
)
from megatron_tropd.planning.parameters import PlannedModel
from megatron_tropd.planning.planned_run import PlannedRun

MOST_SEQUENCES = {"cpu": 256, "gpu": 256, "large gpu": 1024}
"""Sequences that vLLM decodes together by default."""
_LARGE = 70 * 2**30
"""Bytes of memory from which on vLLM takes a GPU for large, unless it is an A100."""
_FLOAT32 = 4
_READ_AND_WRITTEN = 7 * _FLOAT32
"""Adam on the host, a parameter: gradient, weight and moments read, the last three written."""


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

    @property
    def training(self) -> float:
        """All phases but the rollout."""
        return self.teacher + self.student + self.optimizer + self.sync

    @property
    def waiting(self) -> float:
        """For samples: the whole rollout, or what is left of it after all that goes on beside."""
        if not self.overlapped:
            return self.rollout
        return max(0.0, self.rollout - self.training)

    @property
    def total(self) -> float:
        """Of one step."""
        return self.waiting + self.training


def seconds(run: PlannedRun, sent: Communication) -> Seconds:
    """Every phase of one step."""
    passes = pass_seconds(run, run.student, backward=True)
    student = passes + _reduction_seconds(run, sent, passes)
    if run.config.loss.needs_student_pass:
        student += pass_seconds(run, run.student, backward=False)
    return Seconds(
        rollout=rollout_seconds(run),
        teacher=_scoring_seconds(run),
        student=student,
        optimizer=optimizer_seconds(run),
        sync=sync_seconds(run),
        overlapped=run.separate and run.rollout.steps_ahead == 1,
    )


def fewest_seconds(run: PlannedRun) -> float:
    """Of a step's products alone if all GPUs had equal shares of them: no layout is faster."""
    positions = run.work.trajectories * run.work.mean

    def forward(model: PlannedModel) -> float:
        return model.shape.layers * layer_seconds(run, model, positions) / run.parallel.world_size

    scored = min(
        sum(map(forward, teacher.named)) if teacher.gives_states else 0.0
        for teacher in run.teachers
    )
    return scored + (2 if run.lora else 3) * forward(run.student)


def _scoring_seconds(run: PlannedRun) -> float:
    """Of all teachers, which score one after the other; each has an equal share of the rows."""
    share = 1 / len(run.teachers)
    return sum(
        teacher_seconds(run, model, share)
        for teacher in run.teachers
        for model in (teacher.named if teacher.gives_states else ())
    )


def teacher_seconds(run: PlannedRun, model: PlannedModel, share: float = 1.0) -> float:
    """Of the scoring by one model, whose weights may have to come from the host.

    All together they come before it; layer by layer, for each micro-batch beside its products.

    Args:
        share: of a step's rows.
    """
    own = run.scoring
    passes, arrival = share * pass_seconds(own, model, backward=False), 0.0
    if model in run.frozen:
        arrival = visiting_bytes(run, model, 0).moved / run.hardware.host_link
    if run.options.teacher == "host_by_layer":
        passes, arrival = max(passes, share * _slots(own) * arrival), 0.0
    link = run.hardware.link(own.parallel.world_size)
    return passes + arrival + share * exchanged_bytes(run, model) / link


def exchanged_bytes(run: PlannedRun, model: PlannedModel) -> float:
    """Hidden states that a rank of the last stage gets from a model in a layout of its own."""
    if not run.elsewhere:
        return 0.0
    return run.work.loss_tokens * model.shape.hidden * run.element


def layer_flops(model: PlannedModel, positions: float, length: float) -> float:
    """Of one layer's forward pass, all tensor-parallel ranks together.

    Two for each parameter a position is multiplied with; causal attention of 2 x 2 x length / 2
    for each query column, or of the window if that is shorter.
    """
    shape = model.shape
    seen = length / 2
    if shape.windows:
        seen = sum(min(length / 2, w or length) for w in shape.windows) / shape.layers
    products = 2 * model.active / shape.layers
    return positions * (products + 4 * shape.heads * shape.head_dim * seen)


def layer_seconds(run: PlannedRun, model: PlannedModel, positions: float) -> float:
    """Of one layer's forward pass on one GPU; experts' products are slower."""
    experts = 2 * positions * model.active_experts / model.shape.layers
    others = layer_flops(model, positions, run.work.mean) - experts
    return others / run.hardware.flops + experts / run.hardware.expert_flops


def loss_flops(run: PlannedRun, tokens: float) -> float:
    """Logits of all models, gradients of the student's hidden states and trained output layer."""
    student, teacher = run.student.shape.hidden, 0
    if run.gives_states:
        teacher = max(sum(m.shape.hidden for m in one.named) for one in run.teachers)
    return 2 * tokens * run.padded_vocab * ((2 if run.lora else 3) * student + teacher)


def pass_seconds(run: PlannedRun, model: PlannedModel, *, backward: bool) -> float:
    """A pipeline's passes over all micro-batches: :func:`_slots` times the slowest stage.

    Args:
        backward: with backward pass (twice the products of the forward) and loss.
    """
    p, work, hardware = run.parallel, run.work, run.hardware
    m = work.micro_batches
    stages = stage_sizes(model.shape.layers, p.pipeline, p.virtual_pipeline)
    one_layer = layer_seconds(run, model, work.positions / m)
    # Frozen weights have no gradients, and adapters' products are few.
    each = (2 if run.lora else 3) + repeated_products(run) if backward else 1
    products = [each * layers * one_layer for layers in stages]
    if backward:
        products[-1] += loss_flops(run, work.loss_tokens / m) / hardware.flops
    slot = max(products) / p.tensor + _talk(run, model, backward=backward) / m
    if backward:  # offloaded tensors move beside the products, there and back
        slot = max(slot, 2 * _moved_bytes(run) / hardware.host_link)
    return _slots(run) * slot


def _slots(run: PlannedRun) -> float:
    """Micro-batches in whose time one stage could do all it has to, its waiting counted.

    m + p - 1; of v virtual stages a part is 1 / v as long, and so is what a stage waits for.
    """
    p = run.parallel
    return run.work.micro_batches + (p.pipeline - 1) / p.virtual_pipeline


def repeated_products(run: PlannedRun) -> float:
    """Share of the student's forward products that its backward pass repeats."""
    model, work = run.student, run.work
    modules, again = run.options.recompute.modules, repeated(run)
    if again.layers or not modules:
        return again.layers
    forward = layer_flops(model, 1, work.mean)
    attention = forward - 2 * model.active / model.shape.layers
    share = attention / forward if "core_attn" in modules else 0.0
    if model.shape.experts:
        routed = 2 * model.active_experts / model.shape.layers
        return share + (routed / forward if "moe" in modules else 0.0)
    mlp = 6 * model.shape.hidden * model.shape.ffn
    return share + (mlp / forward if "mlp" in modules else 0.0)


def _moved_bytes(run: PlannedRun) -> float:
    """Activations of one micro-batch that a rank of the first stage sends to the host."""
    if not run.options.offload:
        return 0.0
    flying = min(run.parallel.pipeline, run.work.most_micro_batches)
    return activations(run, 0).on_host / flying


def _talk(run: PlannedRun, model: PlannedModel, *, backward: bool) -> float:
    """Seconds of the collectives of one stage and all micro-batches."""
    p, hardware = run.parallel, run.hardware
    routes = 2 + repeated(run).routes if backward else 1
    exchanged, gathered = expert_bytes(run, model, passes=routes)
    sums = student_sums(run) if backward else 1
    summed = tensor_bytes(run, model, passes=sums) + gathered
    across = pipeline_bytes(run, model, passes=2 if backward else 1)
    rows = context_bytes(run, model, passes=2 + repeated(run).attention if backward else 1)
    return (
        summed / hardware.link(p.tensor)
        + rows / hardware.link(p.tensor * p.context)
        + exchanged / hardware.link(p.shards_of_expert * p.expert)
        + across / hardware.link(p.world_size)
    )


def _reduction_seconds(run: PlannedRun, sent: Communication, passes: float) -> float:
    """Gradients over the replicas, beside the last backward pass if they overlap.

    The distributed optimizer's share for new weights belongs to the optimizer; it is small and
    goes over the same links, so it is counted here. ``overlap_param_gather`` hides nothing: the
    weights go to the engines before the next forward pass.
    """
    p, hardware, element = run.parallel, run.hardware, run.gradient_element
    over_replicas = sent.data / hardware.link(p.tensor * p.replicas)
    if run.options.overlap_gradients:
        gradients = element / (element + run.element) if p.distributed_optimizer else 1.0
        last_backward = passes * 2 / 3 / _slots(run)
        over_replicas -= min(over_replicas * gradients, last_backward)
    return over_replicas + sent.tied_embedding / hardware.link(p.world_size)


def optimizer_seconds(run: PlannedRun) -> float:
    """Adam reads gradient, weight and two moments, writes the last three and the bfloat16 weight.

    Before it, gradients are cleared and their norm is taken. What the host updates goes there as
    float32 gradients and comes back as float32 weights.
    """
    hardware, held = run.hardware, run.trained_of(0)
    away = offloaded_parameters(run)
    updated = updated_parameters(run, held) - away
    on_gpu = (2 * run.gradient_element * held.total + 30 * updated) / hardware.memory_bandwidth
    moved = 2 * _FLOAT32 * away / hardware.host_link
    return on_gpu + moved + _READ_AND_WRITTEN * away / (hardware.host_memory_gb_s * 1e9)


def rollout_seconds(run: PlannedRun) -> float:
    """Prompts, then one decoding step for each token, waves of sequences after one another.

    A decoding step reads the weights (of a mixture, the experts that some sequence needs) and
    the keys and values of all sequences, or multiplies, whichever takes longer, and then waits
    for two collectives a layer if the engine has several GPUs.
    """
    hardware, gpus = run.hardware, run.rollout.engine_tensor_parallel
    sequences = -(-run.work.trajectories // run.rollout.num_engines)
    sequences_at_once = concurrent_sequences(run)
    waves = max(1.0, sequences / sequences_at_once)
    matrices = 2 * (run.student.active + run.padded_vocab * run.student.shape.hidden)
    middle = run.work.prompt + run.work.mean_response / 2
    cache = sequences_at_once * middle * cache_bytes_per_token(run)
    read = (_weights_read(run, sequences_at_once) / gpus + cache) / hardware.memory_bandwidth
    multiply = sequences_at_once * matrices / gpus / hardware.flops
    one_step = max(read, multiply) + hardware.decode_overhead_ms / 1e3
    if gpus > 1:
        one_step += 2 * run.student.shape.layers * hardware.hop_us / 1e6
    prompts = sequences * run.work.prompt * 2 * run.student.active / gpus / hardware.flops
    return _arrival_seconds(run) + prompts + waves * run.work.mean_response * one_step


def concurrent_sequences(run: PlannedRun) -> int:
    """Sequences an engine decodes together: its own limit, its work, its cache."""
    mine = -(-run.work.trajectories // run.rollout.num_engines)
    room = int(cache_tokens(run) // (run.work.prompt + run.work.mean_response))
    return max(1, min(most_sequences(run), mine, room))


def most_sequences(run: PlannedRun) -> int:
    """``rollout.max_num_seqs``, or vLLM's default for the device."""
    hardware = run.hardware
    large = hardware.memory_gb * 1e9 >= _LARGE and "a100" not in hardware.name.lower()
    default = "cpu" if hardware.layers == "cpu" else "large gpu" if large else "gpu"
    return run.rollout.max_num_seqs or MOST_SEQUENCES[default]


def sync_seconds(run: PlannedRun) -> float:
    """New weights on their way.

    Colocated: each GPU of an engine gets all of them over the node's links, lays them into a buffer
    there, and the engine reads that; or, through shared memory, one process writes and reads them.
    Separate: they are written into the run's folder.
    """
    weights, hardware = run.student.parameters * run.element, run.hardware
    if run.separate:
        return weights / (hardware.shared_folder_gb_s * 1e9)
    if run.through_folder:
        return 2 * weights / (hardware.host_copy_gb_s * 1e9)
    p = run.parallel
    arriving = weights / hardware.link(p.tensor * p.pipeline) if p.world_size > p.replicas else 0.0
    return arriving + 4 * weights / hardware.memory_bandwidth


def _arrival_seconds(run: PlannedRun) -> float:
    """Separate engines read new weights from the run's folder."""
    if not run.separate:
        return 0.0
    bandwidth = run.hardware.shared_folder_gb_s * 1e9
    return run.student.parameters * run.element / bandwidth


def _weights_read(run: PlannedRun, sequences: int) -> float:
    """Bytes of weights that a decoding step needs; experts that no sequence chose stay unread."""
    student, experts = run.student, run.student.shape.experts
    read = float(student.parameters)
    if experts is not None:
        read -= student.in_experts * (1 - experts.per_token / experts.count) ** sequences
    return read * run.element
