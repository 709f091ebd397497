"""Bytes on one GPU, item by item, in each phase of a step.

Weights, gradients and optimizer states follow from the number of parameters; what a schedule keeps
for the backward pass is in ``activations``. A colocated rollout engine shares the GPU: it is woken
for the rollout while the trainer's weights stay, and gives most of its memory back before the
trainer computes. A separate one has GPUs of its own, which hold nothing else.
"""

from dataclasses import dataclass

from megatron_tropd.planning.activations import saved, widths
from megatron_tropd.planning.parameters import Held, Model
from megatron_tropd.planning.setup import Setup

LOSS_BUDGET = {"cpu": 72 * 2**20, "gpu": 4096 * 2**20}
"""Bytes of the loss's chunk buffers; a test compares them with ``losses.chunks``."""
_ALIGNED = 64
"""Columns at whose multiples the rows of these buffers begin on a GPU."""
ENGINE_WORKSPACE = 2 * 2**30
"""Bytes of an engine's own activations and graphs on each of its GPUs, awake or asleep: sleeping
gives back weights and cache. An assumption."""
TEACHER_SHARE = 0.85
"""Of a GPU's memory for the teacher's engine, which is gone before the models are built."""
_FLOAT32 = 4
_VALUES_OF_A_TOKEN = 16
"""32-bit words that the loss reports of a token; measured."""


@dataclass(frozen=True)
class Engine:
    """Bytes of a rollout engine on each of its GPUs."""

    weights: float
    workspace: float
    cache: float
    """What its share leaves for keys and values; below 0 where the rest needs more."""
    asleep: float
    """What it keeps while the trainer computes; everything on a CPU, where engines never sleep."""

    @property
    def total(self) -> float:
        """Awake."""
        return self.weights + self.workspace + max(self.cache, 0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU of one pipeline stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    teacher_weights: float
    teacher_hidden: float
    """The teacher's hidden states of the whole step, kept until the student has learned."""
    teacher_forward: float
    """While the teacher scores one micro-batch."""
    student_hidden: float
    """The student's own hidden states of the whole step, for losses that look at them first."""
    activations: float
    """Saved for the student's backward pass, most at a time."""
    backward: float
    """Gradients of activations on their way through one layer."""
    loss: float
    """Chunk buffers, gradients of hidden states and output layer, per-token values."""
    engine_weights: float
    """Of a colocated engine, as the next three; 0 where engines have GPUs of their own."""
    engine_workspace: float
    kv_cache: float
    engine_asleep: float
    """What stays of the three while the trainer computes."""

    @property
    def resident(self) -> float:
        """What is there in every phase."""
        return self.weights + self.gradients + self.optimizer + self.teacher_weights

    @property
    def phases(self) -> dict[str, float]:
        """Peak of each phase."""
        awake = self.engine_weights + self.engine_workspace + max(self.kv_cache, 0.0)
        training = self.resident + self.engine_asleep + self.teacher_hidden
        # The loss is gone by the time the gradients have reached a layer.
        passing = max(self.activations, self.student_hidden) + max(self.backward, self.loss)
        return {
            "rollout": self.resident + awake,
            "teacher": training + self.teacher_forward,
            "student": training + passing,
        }

    @property
    def peak(self) -> float:
        """The largest phase."""
        return max(self.phases.values())


def memory_of_stage(made: Setup, stage: int) -> Memory:
    """Every item on a GPU of a pipeline stage.

    Args:
        made: the run.
        stage: 0-based.
    """
    student, teacher = made.held(made.student, stage), made.held(made.teacher, stage)
    last = stage == made.last_stage
    engine = Engine(0.0, 0.0, 0.0, 0.0) if made.separate else engine_memory(made)
    scores = last and made.config.loss.needs_student_pass
    return Memory(
        stage=stage,
        weights=student.total * made.element,
        gradients=student.total * _FLOAT32,
        optimizer=optimizer_bytes(made, student),
        teacher_weights=teacher.total * made.element,
        teacher_hidden=_hidden_states(made, made.teacher) if last else 0.0,
        teacher_forward=_working_set(made, made.teacher),
        student_hidden=_hidden_states(made, made.student) if scores else 0.0,
        activations=saved(
            made.student.shape,
            made.parallel,
            stage=stage,
            positions=made.work.most_positions,
            length=made.work.longest,
            micro_batches=made.work.most_micro_batches,
            element=made.element,
            layers=made.hardware.layers,
        ),
        backward=_working_set(made, made.student),
        loss=loss_bytes(made) if last else 0.0,
        engine_weights=engine.weights,
        engine_workspace=engine.workspace,
        kv_cache=engine.cache,
        engine_asleep=engine.asleep,
    )


def memory(made: Setup) -> list[Memory]:
    """:func:`memory_of_stage` for every stage."""
    return [memory_of_stage(made, stage) for stage in range(made.parallel.pipeline)]


def fullest_stages(made: Setup) -> list[Memory]:
    """The first stage and the last: no other holds more layers, or more micro-batches in flight."""
    return [memory_of_stage(made, stage) for stage in sorted({0, made.last_stage})]


def obstacle(made: Setup, stages: list[Memory]) -> str:
    """Why a layout does not fit, or nothing if it does.

    Args:
        made: the run.
        stages: the fullest at least.
    """
    usable, peak = made.hardware.usable_bytes, max(stage.peak for stage in stages)
    if peak > usable:
        return f"a training GPU needs {peak / 1e9:.1f} GB of {usable / 1e9:.1f} usable ones"
    engine = engine_memory(made)
    if made.separate and engine.total > usable:
        return (
            f"rollout.engine_memory = {made.rollout.engine_memory:g} is {engine.total / 1e9:.1f} "
            f"GB, an engine's GPU has {usable / 1e9:.1f} usable ones"
        )
    return engine_obstacle(made)


def engine_obstacle(made: Setup) -> str:
    """Why an engine cannot hold one trajectory, or nothing if it can.

    An evaluation by exact match starts engines of the teacher before anything else.
    """
    evaluation, models = made.config.evaluation, [made.student]
    if evaluation.problems and evaluation.task == "exact_match" and evaluation.teacher:
        models.append(made.teacher)
    for model in models:
        if (tokens := cache_tokens(made, model)) < made.work.longest:
            return (
                f"an engine of the {model.who} has room for {tokens} tokens of cache, one "
                f"trajectory has {made.work.longest}"
            )
    return ""


def optimizer_bytes(made: Setup, held: Held) -> float:
    """Adam's two moments in float32 and, for bfloat16 weights, the float32 ones.

    The distributed optimizer shards them over the replicas: all of them for dense parameters,
    those that hold the same experts for these.
    """
    per_parameter = (3 if made.element == 2 else 2) * _FLOAT32
    if not made.parallel.distributed_optimizer:
        return held.total * per_parameter
    p = made.parallel
    return per_parameter * (held.dense / p.data + held.experts / p.expert_replicas)


def loss_bytes(made: Setup) -> float:
    """What the loss of one micro-batch adds at the last stage.

    Logits of both models in float32 for a chunk of tokens and the gradient of bfloat16, within a
    budget (twice the chunks where collectives overlap); the student's hidden states [T, H] and, in
    float32, their gradient; the output layer's gradient [v, H] in float32; per-token values.
    """
    tokens, shard = made.work.most_loss_tokens, made.vocab_shard
    hidden = made.student.shape.hidden
    values = 4 * _VALUES_OF_A_TOKEN * tokens
    gradients = hidden * (tokens * (made.element + _FLOAT32) + shard * _FLOAT32)
    return chunk_bytes(made, tokens) + gradients + values


def chunk_bytes(made: Setup, tokens: int) -> float:
    """The loss's chunk buffers: logits of all tokens, or as many rows as the budget holds.

    On a GPU rows begin at multiples of 64 columns, and the gradient of bfloat16 has a buffer too.
    """
    if made.hardware.layers == "cpu":
        return min(LOSS_BUDGET["cpu"], 2 * _FLOAT32 * tokens * made.vocab_shard)
    of_column = 2 * _FLOAT32 + (made.element if made.element == 2 else 0)
    columns = -(-made.vocab_shard // _ALIGNED) * _ALIGNED
    return min(LOSS_BUDGET["gpu"], of_column * tokens * columns)


def engine_memory(made: Setup, model: Model | None = None) -> Engine:
    """An engine on each of its GPUs.

    Args:
        made: the run.
        model: what it serves; None: the student.
    """
    model, rollout = model or made.student, made.rollout
    weights = model.parameters * made.element / rollout.engine_tensor_parallel
    if made.hardware.layers == "cpu":
        cache = rollout.engine_memory * 2**30
        return Engine(weights, 0.0, cache, weights + cache)
    of_memory = rollout.engine_memory
    if model.who == "teacher" and not made.separate:
        of_memory = max(of_memory, TEACHER_SHARE)
    share = of_memory * made.hardware.memory_gb * 1e9
    cache = share - weights - ENGINE_WORKSPACE
    return Engine(weights, ENGINE_WORKSPACE, cache, ENGINE_WORKSPACE)


def cache_bytes_per_token(made: Setup, model: Model | None = None) -> float:
    """Keys and values of one token on one GPU of an engine; heads are copied, not split below 1."""
    shape, gpus = (model or made.student).shape, made.rollout.engine_tensor_parallel
    heads = max(shape.kv_heads / gpus, 1)
    return 2 * shape.layers * heads * shape.head_dim * made.element


def cache_tokens(made: Setup, model: Model | None = None) -> int:
    """Tokens that an engine's cache holds."""
    return max(0, int(engine_memory(made, model).cache / cache_bytes_per_token(made, model)))


def host_bytes(made: Setup) -> float:
    """Of a node's own memory: weights on their way to its engines.

    Colocated engines get the student on their GPUs, or through shared memory, all of the node at
    the same time, if ``rollout.weight_transport = "folder"``. What goes to separate ones directly
    is kept on the first node until it is in the run's folder, too.
    """
    if made.hardware.layers == "cpu":
        return 0.0
    if made.separate:
        return float(made.student.parameters * made.element) if made.direct else 0.0
    if made.rollout.weight_transport != "folder":
        return 0.0
    world = made.parallel.world_size
    engines = -(-made.rollout.num_engines * min(made.hardware.gpus_per_node, world) // world)
    return float(engines * made.student.parameters * made.element)


def checkpoint_bytes(made: Setup) -> float:
    """About what one checkpoint takes on disk: the student's weights and optimizer states."""
    states = 12 if made.element == 2 else 8
    return made.student.parameters * (made.element + states)


def _hidden_states(made: Setup, model: Model) -> float:
    return made.work.step_loss_tokens * model.shape.hidden * made.element


def _working_set(made: Setup, model: Model) -> float:
    """The residual stream and the widest layer output of one micro-batch, and as much again."""
    w = widths(model.shape, made.parallel, made.element, made.hardware.layers)
    routes = model.shape.experts.per_token if model.shape.experts else 1
    widest = max(w.fused_qkv, routes * (3 * w.ffn + (w.routed_hidden if routes > 1 else 0)))
    return made.work.most_positions * made.element * (2 * w.hidden + 2 * widest)
