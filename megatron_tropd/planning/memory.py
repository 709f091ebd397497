"""Bytes on one GPU, item by item, in each phase of a step.

Weights, gradients and optimizer states follow from the number of parameters; what a schedule keeps
for the backward pass is in ``activations``. A colocated rollout engine shares the GPU: it is woken
for the rollout while the trainer's weights stay, and its memory is given back before the trainer
computes. Servers have GPUs of their own (:func:`engine_memory`).
"""

from dataclasses import dataclass

from megatron_tropd.planning.activations import saved, widths
from megatron_tropd.planning.parameters import Held, Model
from megatron_tropd.planning.setup import Setup

LOSS_BUDGET = {"cpu": 72 * 2**20, "gpu": 2048 * 2**20}
"""Bytes of the loss's chunk buffers; a test compares them with ``losses.chunks``."""
ENGINE_WORKSPACE = 2 * 2**30
"""Bytes of an engine's own activations and graphs on each of its GPUs. An assumption."""
_FLOAT32 = 4
_VALUES_OF_A_TOKEN = 16
"""32-bit words that the loss reports of a token; measured."""


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
    activations: float
    """Saved for the student's backward pass, most at a time."""
    backward: float
    """Gradients of activations on their way through one layer."""
    loss: float
    """Chunk buffers, gradients of hidden states and output layer, per-token values."""
    engine: float
    """What the rollout engine takes on this GPU: its weights, its cache, its workspace; 0 where
    engines are servers with GPUs of their own."""
    engine_weights: float
    kv_cache: float
    """Part of ``engine`` that is left for keys and values; below 0 where the rest needs more."""

    @property
    def resident(self) -> float:
        """What is there in every phase."""
        return self.weights + self.gradients + self.optimizer + self.teacher_weights

    @property
    def phases(self) -> dict[str, float]:
        """Peak of each phase."""
        return {
            "rollout": self.resident + self.engine,
            "teacher": self.resident + self.teacher_hidden + self.teacher_forward,
            # The loss is gone by the time the gradients have reached a layer.
            "student": self.resident
            + self.teacher_hidden
            + self.activations
            + max(self.backward, self.loss),
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
    engine_weights, cache = (0.0, 0.0) if made.separate else engine_memory(made)
    workspace = 0.0 if made.separate else _workspace(made)
    return Memory(
        stage=stage,
        weights=student.total * made.element,
        gradients=student.total * _FLOAT32,
        optimizer=optimizer_bytes(made, student),
        teacher_weights=teacher.total * made.element,
        teacher_hidden=_hidden_states(made, made.teacher) if last else 0.0,
        teacher_forward=_working_set(made, made.teacher),
        activations=saved(
            made.student.shape,
            made.parallel,
            stage=stage,
            rows=made.work.rows_per_micro_batch,
            length=made.work.longest,
            micro_batches=made.work.micro_batches,
            element=made.element,
            layers=made.hardware.layers,
        ),
        backward=_working_set(made, made.student),
        loss=loss_bytes(made) if last else 0.0,
        engine=engine_weights + max(cache, 0.0) + workspace,
        engine_weights=engine_weights,
        kv_cache=cache,
    )


def memory(made: Setup) -> list[Memory]:
    """:func:`memory_of_stage` for every stage."""
    return [memory_of_stage(made, stage) for stage in range(made.parallel.pipeline)]


def fits(made: Setup, stages: list[Memory]) -> bool:
    """Whether every phase fits every GPU and an engine can hold one trajectory."""
    if cache_tokens(made) < made.work.longest:
        return False
    return max(stage.peak for stage in stages) <= made.hardware.usable_bytes


def optimizer_bytes(made: Setup, held: Held) -> float:
    """Adam's two moments in float32 and, for bfloat16 weights, the float32 ones.

    The distributed optimizer shards them over the replicas: all of them for dense parameters,
    the data / expert ones that hold the same experts for those.
    """
    per_parameter = (3 if made.element == 2 else 2) * _FLOAT32
    if not made.parallel.distributed_optimizer:
        return held.total * per_parameter
    replicas, sharers = made.parallel.data, made.parallel.expert
    return per_parameter * (held.dense / replicas + held.experts / (replicas // sharers))


def loss_bytes(made: Setup) -> float:
    """What the loss of one micro-batch adds at the last stage.

    Logits of both models in float32 for a chunk of tokens, within a budget (twice the chunks
    where collectives overlap); the student's hidden states [T, H] and their gradient; the output
    layer's gradient [v, H] in float32; per-token values.
    """
    tokens, shard = made.work.most_loss_tokens, made.vocab_shard
    hidden = made.student.shape.hidden
    values = 4 * _VALUES_OF_A_TOKEN * tokens
    gradients = 2 * tokens * hidden * made.element + shard * hidden * _FLOAT32
    return chunk_bytes(made, tokens) + gradients + values


def chunk_bytes(made: Setup, tokens: int) -> float:
    """The loss's chunk buffers: logits of all tokens, or as many rows as the budget holds."""
    kind = "cpu" if made.hardware.layers == "cpu" else "gpu"
    return min(LOSS_BUDGET[kind], 2 * _FLOAT32 * tokens * made.vocab_shard)


def engine_memory(made: Setup) -> tuple[float, float]:
    """(weights, what is left for the cache) of an engine, bytes on each of its GPUs."""
    weights = made.student.parameters * made.element / made.rollout.engine_tensor_parallel
    if made.hardware.layers == "cpu":
        return weights, made.rollout.engine_memory * 2**30
    share = made.rollout.engine_memory * made.hardware.memory_gb * 1e9
    return weights, share - weights - _workspace(made)


def cache_bytes_per_token(made: Setup) -> float:
    """Keys and values of one token on one GPU of an engine; heads are copied, not split below 1."""
    shape, gpus = made.student.shape, made.rollout.engine_tensor_parallel
    heads = max(shape.kv_heads / gpus, 1)
    return 2 * shape.layers * heads * shape.head_dim * made.element


def cache_tokens(made: Setup) -> int:
    """Tokens that an engine's cache holds."""
    return max(0, int(engine_memory(made)[1] / cache_bytes_per_token(made)))


def _workspace(made: Setup) -> float:
    return 0.0 if made.hardware.layers == "cpu" else ENGINE_WORKSPACE


def _hidden_states(made: Setup, model: Model) -> float:
    return made.work.step_loss_tokens * model.shape.hidden * made.element


def _working_set(made: Setup, model: Model) -> float:
    """The residual stream and the widest layer output of one micro-batch, and as much again."""
    w = widths(model.shape, made.parallel, made.element, made.hardware.layers)
    routes = model.shape.experts.per_token if model.shape.experts else 1
    widest = max(w.fused_qkv, routes * (3 * w.ffn + (w.hidden if routes > 1 else 0)))
    return made.work.most_positions * made.element * (2 * w.hidden + 2 * widest)
