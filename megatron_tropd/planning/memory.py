"""Bytes on one GPU, item by item, in each phase of a step.

Weights, gradients and optimizer states follow from the number of parameters; what a schedule keeps
for the backward pass is in ``activations``. A colocated rollout engine shares the GPU: it is woken
for the rollout while the trainer's weights stay, and gives most of its memory back before the
trainer computes. A separate one has GPUs of its own, which hold nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.config.teacher_cache import signal_bytes_per_token
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.planning.activations import activations, widths
from megatron_tropd.planning.parameters import PlannedModel, RankParameters
from megatron_tropd.planning.planned_run import PlannedRun, PlannedTeacher

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
_GROUP, _OF_CANDIDATE = 32, 20
"""Columns of a group from which the largest logits are taken, and bytes of such a column."""
_BUCKET = 256 * 2**20
"""Bytes of weights that an engine reads at a time; a test compares it with the trainer's."""
_BUCKET_PARAMETERS, _OF_REPLICA = 40_000_000, 1_000_000
"""Megatron's size of a bucket of gradients: at least, and for each replica."""
_ON_HOST = 4 * _FLOAT32
"""Bytes in the host's memory of a parameter that it updates: gradient, weight, two moments."""
ROUND_OF_STAGE = 4
"""Micro-batches for each stage of a teacher in a layout of its own, between two exchanges of hidden
states; a test compares it with the trainer's."""
_VALUES_OF_A_TOKEN = 16
"""32-bit words that the loss reports of a token; measured."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a rollout engine on each of its GPUs."""

    weights: float
    workspace: float
    cache: float
    """What its share leaves for keys and values; below 0 if the rest needs more."""
    asleep: float
    """What it keeps while the trainer computes; everything on a CPU, where engines never sleep."""
    warmup: float = 0.0
    """Of the engine beside it that holds student and teacher (``rollout.behaviour``)."""

    @property
    def total(self) -> float:
        """Awake."""
        return self.weights + self.workspace + max(self.cache, 0.0) + self.warmup


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU of one pipeline stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    teacher_weights: float
    """Of teachers and their references, as the next four: what is always on the GPU; an average of
    the student's weights, too."""
    teacher_hidden: float
    """Hidden states of the whole step, or a cached teacher's most likely ids with their log-probs,
    kept until the student has learned."""
    teacher_forward: float
    """While one of them scores one micro-batch."""
    teacher_visiting: float
    """Weights of one of them that are on the GPU only while it scores, most at a time."""
    teacher_copies: float
    """What a teacher with rows of its own said, put in the student's order."""
    teacher_output: float
    """An average's output layer in the student's type, which the loss reads."""
    student_hidden: float
    """The student's own hidden states of the whole step, for losses that look at them first."""
    activations: float
    """Saved for the student's backward pass, most at a time."""
    recomputed: float
    """Saved while one unit of layers, or the modules of one layer, are computed again."""
    backward: float
    """Gradients of activations on their way through one layer."""
    loss: float
    """Chunk buffers, gradients of hidden states and output layer, per-token values."""
    engine_weights: float
    """Of a colocated engine, as the next three; 0 if engines have GPUs of their own."""
    engine_workspace: float
    kv_cache: float
    engine_asleep: float
    """What stays of the three while the trainer computes."""
    update: float
    """Temporaries of the optimizer."""
    export: float
    """Tensors on their way to the engine."""
    saving: float
    """Optimizer states on their way to a checkpoint."""
    build: float
    """All models before the first step: frozen ones go to the host once they are built."""

    @property
    def resident(self) -> float:
        """What is there in every phase."""
        return self.weights + self.gradients + self.optimizer + self.teacher_weights

    @property
    def trainer(self) -> dict[str, float]:
        """Peak of each phase, what an engine holds left out."""
        signals = self.resident + self.teacher_hidden
        scoring = max(self.teacher_visiting + self.teacher_forward, self.teacher_copies)
        # The loss is gone by the time the gradients have reached a layer.
        backward = max(self.backward + self.recomputed, self.loss)
        learning = self.teacher_output + max(self.activations, self.student_hidden) + backward
        return {
            "rollout": self.resident,
            "teacher": signals + scoring,
            "student": signals + learning,
            "optimizer": self.resident + self.update,
            "sync": self.resident + self.export,
            "checkpoint": self.resident + self.saving,
        }

    @property
    def phases(self) -> dict[str, float]:
        """Peak of each phase; an engine is awake to sample, and half awake to take weights."""
        woken = self.engine_weights + self.engine_workspace
        awake = {"rollout": woken + max(self.kv_cache, 0.0), "sync": woken}
        return {
            phase: size + awake.get(phase, self.engine_asleep)
            for phase, size in self.trainer.items()
        }

    @property
    def peak(self) -> float:
        """The largest phase."""
        return max(*self.phases.values(), self.build + self.engine_asleep)


def memory_of_stage(run: PlannedRun, stage: int) -> Memory:
    """Every item on a GPU of a pipeline stage."""
    trained = run.trained_of(stage)
    last = stage == run.last_stage
    scores = last and run.config.loss.needs_student_pass
    passes = activations(run, stage)
    visits = [visiting_bytes(run, model, stage) for model in run.frozen]
    frozen = float(sum(run.frozen_on(m, stage) for m in run.frozen) * run.element)
    stays = frozen if run.hardware.layers == "cpu" else frozen - sum(v.moved for v in visits)
    average = float(_FLOAT32 * trained.total * run.averages)
    as_student = run.element * trained.total if run.averages and run.element < _FLOAT32 else 0
    return Memory(
        stage=stage,
        weights=run.student_of(stage) * run.element,
        gradients=trained.total * run.gradient_element,
        optimizer=optimizer_bytes(run, trained),
        teacher_weights=stays + average,
        teacher_hidden=_signals(run) if last else 0.0,
        teacher_forward=max((_scoring_bytes(run, m) for m in _scorers(run)), default=0.0),
        teacher_visiting=max([float(as_student), *(v.at_once for v in visits)]),
        teacher_copies=_copies(run) if last else 0.0,
        teacher_output=_average_output(run) if last else 0.0,
        student_hidden=_hidden_states(run, run.student) if scores else 0.0,
        activations=passes.kept,
        recomputed=passes.recomputed,
        backward=_working_set(run, run.student),
        loss=loss_bytes(run) if last else 0.0,
        update=_update_bytes(run, trained),
        saving=_saving_bytes(run, trained, stage),
        build=(
            run.student_of(stage) * float(run.element)
            + trained.total * run.gradient_element
            + _main_weights(run, trained)
            + stays
            + average
            + (_arriving_output(run) if last else 0.0)
            + max((v.moved for v in visits), default=0.0)
        ),
        **_of_engines(run, stage),
    )


def beside(stages: list[Memory], run: PlannedRun) -> list[Memory]:
    """The same stages beside other engines."""
    return [replace(stage, **_of_engines(run, stage.stage)) for stage in stages]


def _of_engines(run: PlannedRun, stage: int) -> dict[str, Any]:
    """What engines have to do with on a trainer's GPU."""
    engine = EngineMemory(0.0, 0.0, 0.0, 0.0) if run.separate else engine_memory(run)
    return {
        "engine_weights": engine.weights,
        "engine_workspace": engine.workspace,
        "kv_cache": engine.cache,
        "engine_asleep": engine.asleep,
        "export": _export_bytes(run, stage),
    }


@dataclass(frozen=True)
class Visit:
    """Bytes of a frozen model's weights on a rank that lie on the host (``teacher.offload``)."""

    moved: float = 0.0
    """All of them."""
    at_once: float = 0.0
    """On the GPU at a time while the model scores."""


def visiting_bytes(run: PlannedRun, model: PlannedModel, stage: int) -> Visit:
    """Embedding and layers: all of them visit, or one is run while the next arrives."""
    offload = run.options.teacher
    if offload == "none":
        return Visit()
    own, stages = run.scoring, run.scoring_stages(stage)
    held = [model.parts_on_rank(own.parallel, number, own.padded_vocab) for number in stages]
    parts = max(held, key=sum)
    moved = float(sum(parts) * run.element)
    two = float(sum(sorted(parts)[-2:]) * run.element)
    return Visit(moved, moved if offload == "host" else two)


def memory(run: PlannedRun) -> list[Memory]:
    """:func:`memory_of_stage` for every stage."""
    return [memory_of_stage(run, stage) for stage in range(run.parallel.pipeline)]


def fullest_stages(run: PlannedRun) -> list[Memory]:
    """The first stage and the last: no other holds more layers, or more micro-batches in flight."""
    return [memory_of_stage(run, stage) for stage in sorted({0, run.last_stage})]


def obstacle(run: PlannedRun, stages: list[Memory]) -> str:
    """Why a layout does not fit, or nothing if it does."""
    usable, peak = run.hardware.usable_bytes, max(stage.peak for stage in stages)
    if peak > usable:
        return f"a training GPU needs {peak / 1e9:.1f} GB of {usable / 1e9:.1f} usable ones"
    engine = engine_memory(run)
    if run.separate and engine.total > usable:
        return (
            f"rollout.engine_gpu_share = {run.rollout.engine_gpu_share:g} is "
            f"{engine.total / 1e9:.1f} GB, an engine's GPU has {usable / 1e9:.1f} usable ones"
        )
    on_host, has = host_bytes(run) + saving_host_bytes(run), run.hardware.host_memory_gb * 1e9
    if run.hardware.layers != "cpu" and on_host > has:
        return (
            f"a node needs {on_host / 1e9:.0f} GB of memory of its own while it saves a "
            f"checkpoint, it has {has / 1e9:.0f}"
        )
    return engine_obstacle(run)


def engine_obstacle(run: PlannedRun) -> str:
    """Why an engine cannot hold one sequence, or nothing if it can.

    An evaluation by exact match starts engines of the teacher before anything else.
    """
    evaluation, models = run.config.evaluation, [run.student]
    if evaluation.measures and evaluation.task == "exact_match" and evaluation.teacher:
        models += [teacher.model for teacher in run.teachers]
    for model in models:
        if (tokens := cache_tokens(run, model)) < run.work.longest:
            return (
                f"an engine of the {model.who} has room for {tokens} tokens of cache, one "
                f"trajectory has {run.work.longest}"
            )
    return ""


def optimizer_bytes(run: PlannedRun, held: RankParameters) -> float:
    """Adam's two moments and, for bfloat16 weights, the main ones.

    The distributed optimizer shards them. What the host updates has its moments there, its main
    weights only with ``use_precision_aware_optimizer``: Megatron copies them, and keeps the
    originals.
    """
    states, updated = run.options.states, updated_parameters(run, held)
    away = 0.0 if run.hardware.layers == "cpu" else states.on_host
    main = states.main if run.element == 2 else 0.0
    main_stays = 1.0 - (away if states.precision_aware else 0.0)
    return updated * (states.moments * (1 - away) + main * main_stays)


def _main_weights(run: PlannedRun, held: RankParameters) -> float:
    """Of the optimizer's states those that it has before its first step."""
    return updated_parameters(run, held) * run.options.states.main if run.element == 2 else 0.0


def updated_parameters(run: PlannedRun, held: RankParameters) -> float:
    """Parameters that one rank's optimizer updates.

    The distributed optimizer shards them over the replicas: all of them for dense parameters,
    those that hold the same experts for these.
    """
    p = run.parallel
    if not p.distributed_optimizer:
        return float(held.total)
    return held.dense / p.replicas + held.experts / p.expert_replicas


def offloaded_parameters(run: PlannedRun) -> float:
    """Of those of the first stage, how many the host updates; a CPU offloads nothing."""
    if run.hardware.layers == "cpu":
        return 0.0
    return run.options.states.on_host * updated_parameters(run, run.trained_of(0))


def loss_bytes(run: PlannedRun) -> float:
    """What the loss of one micro-batch adds at the last stage.

    Logits of all models in float32 for a chunk of tokens and the gradient of bfloat16, within a
    budget (twice the chunks if collectives overlap); the student's hidden states [T, H] and, in
    float32, their gradient; the output layer's gradient [v, H] in float32, unless that layer is
    frozen; per-token values.
    """
    tokens, shard = run.work.most_loss_tokens, run.vocab_shard
    hidden = run.student.shape.hidden
    values = 4 * _VALUES_OF_A_TOKEN * tokens
    of_layer = 0 if run.lora else shard * _FLOAT32
    gradients = hidden * (tokens * (run.element + _FLOAT32) + of_layer)
    return chunk_bytes(run, tokens) + candidate_bytes(run, tokens) + gradients + values


def chunk_bytes(run: PlannedRun, tokens: int) -> float:
    """The loss's chunk buffers: logits of all tokens, or as many rows as the budget holds.

    On a GPU rows begin at multiples of 64 columns, and the gradient of bfloat16 has a buffer too.
    Under tensor parallelism two chunks share the budget if one does not hold all tokens, so that
    collectives hide behind products.
    """
    if run.hardware.layers == "cpu":
        return min(LOSS_BUDGET["cpu"], _logits(run) * tokens * run.vocab_shard)
    rows, gradient = _chunk_rows(run, tokens), run.element if run.element == 2 else 0
    two = 2 if rows < tokens and run.parallel.tensor > 1 else 1
    return float(rows * _columns(run) * (two * _logits(run) + gradient))


def _chunk_rows(run: PlannedRun, tokens: int) -> int:
    """Tokens of one chunk of the loss on a GPU."""
    two = 2 if run.parallel.tensor > 1 else 1
    of_column = two * _logits(run) + (run.element if run.element == 2 else 0)
    rows = LOSS_BUDGET["gpu"] // (_columns(run) * of_column)
    return min(tokens, rows // 16 * 16 if rows > 16 else max(rows, 1))


def _logits(run: PlannedRun) -> int:
    """Bytes of the logits of one token and column: those of all models, in float32."""
    return _FLOAT32 * (1 + run.scored_beside)


def _columns(run: PlannedRun) -> int:
    return -(-run.vocab_shard // _ALIGNED) * _ALIGNED


def candidate_bytes(run: PlannedRun, tokens: int) -> float:
    """What a chunk's search for the teacher's k largest logits takes on a GPU.

    A cached teacher's were found when it was scored.
    """
    groups = run.config.loss.needs.top_k * _GROUP
    if not run.gives_states or run.hardware.layers == "cpu" or groups >= run.vocab_shard:
        return 0.0
    return float(_chunk_rows(run, tokens) * groups * _OF_CANDIDATE)


def _update_bytes(run: PlannedRun, held: RankParameters) -> float:
    """Temporaries of Adam: torch's on a GPU, and gradients that become float32."""
    updated = updated_parameters(run, held) * (1 - run.options.states.on_host)
    torch_adam = _FLOAT32 if run.hardware.layers == "local" else 0
    converted = 0 if run.gradient_element == _FLOAT32 else _FLOAT32
    return updated * (torch_adam + converted)


def _export_bytes(run: PlannedRun, stage: int) -> float:
    """The largest tensor, gathered and put together; the buffer that an engine reads.

    A stage of which no rank receives gathers what it sends, and puts nothing together.
    """
    largest = run.padded_vocab * run.student.shape.hidden * run.element
    if stage not in receiving_stages(run):
        has_it = stage == 0 or (stage == run.last_stage and not run.student.shape.tied)
        sent, shards = max(largest if has_it else 0, _BUCKET), run.parallel.tensor
        return float(sent * (1 + 1 / shards) if shards > 1 else sent)
    staged = 0 if run.through_folder else max(largest, _BUCKET)
    return float(2 * largest + staged)


def receiving_stages(run: PlannedRun) -> set[int]:
    """Stages of ranks that get all new weights: for a file, or a buffer on an engine's GPU."""
    if run.separate:
        return {0}
    block = run.parallel.world_size // run.rollout.num_engines
    gpus = 1 if run.through_folder else run.rollout.engine_tensor_parallel
    of_stage = run.parallel.tensor * run.parallel.replicas
    owners = range(0, run.parallel.world_size, block)
    return {rank // of_stage for owner in owners for rank in (owner, owner + gpus - 1)}


def _saving_bytes(run: PlannedRun, held: RankParameters, stage: int) -> float:
    """One state of the distributed optimizer: each replica's share, and all of them together."""
    p = run.parallel
    if not p.distributed_optimizer or run.hardware.layers == "cpu":
        return 0.0  # without CUDA they are gathered on the host
    dense, experts = largest_buckets(run, held, stage)
    return _FLOAT32 * max(dense * (1 + 1 / p.replicas), experts * (1 + 1 / p.expert_replicas))


def largest_buckets(run: PlannedRun, held: RankParameters, stage: int) -> tuple[float, float]:
    """Parameters of the largest bucket of gradients: (of dense ones, of experts).

    An embedding that two stages share has its own, and so has each chunk. If gradients are reduced
    beside the backward pass, the first chunk of all has many: the last to be full takes the
    embedding, too.
    """
    p, shape = run.parallel, run.student.shape
    embedding = run.vocab_shard * shape.hidden
    shared = shape.tied and p.pipeline > 1 and stage in (0, run.last_stage)
    if run.lora:
        embedding, shared = 0, False
    alone = embedding if shared else 0
    chunks = list(map(len, stage_chunks(shape.layers, p.pipeline, p.virtual_pipeline)[stage]))
    share = max(chunks) / sum(chunks)
    ends = embedding - alone if stage in (0, run.last_stage) else 0
    dense, experts = (held.dense - alone - ends) * share + ends, held.experts * share
    if run.options.overlap_gradients and (stage, len(chunks)) == (0, 1):
        limit = max(_BUCKET_PARAMETERS, _OF_REPLICA * p.replicas)
        dense, experts = min(dense, limit + embedding - alone), min(experts, limit)
    return max(dense, alone), experts


def engine_memory(run: PlannedRun, model: PlannedModel | None = None) -> EngineMemory:
    """An engine on each of its GPUs.

    Args:
        model: what it serves; None: the student.
    """
    model, rollout = model or run.student, run.rollout
    weights = model.parameters * run.element / rollout.engine_tensor_parallel
    if run.hardware.layers == "cpu":
        cache, warmup = rollout.engine_cpu_kv_gib * 2**30, 0.0
        if rollout.asks_teacher and model is run.student:
            warmup = weights + run.teacher.parameters * run.element + cache
        return EngineMemory(weights, 0.0, cache, weights + cache + warmup, warmup)
    of_memory = rollout.engine_gpu_share
    if model is not run.student and not run.separate:
        of_memory = max(of_memory, TEACHER_SHARE)
    share = of_memory * run.hardware.memory_gb * 1e9
    cache = share - weights - ENGINE_WORKSPACE
    return EngineMemory(weights, ENGINE_WORKSPACE, cache, ENGINE_WORKSPACE)


def cache_bytes_per_token(run: PlannedRun, model: PlannedModel | None = None) -> float:
    """Keys and values of one token on one GPU of an engine; heads are copied, not split below 1."""
    shape, gpus = (model or run.student).shape, run.rollout.engine_tensor_parallel
    heads = max(shape.kv_heads / gpus, 1)
    return 2 * shape.layers * heads * shape.head_dim * run.element


def cache_tokens(run: PlannedRun, model: PlannedModel | None = None) -> int:
    """Tokens that an engine's cache holds."""
    return max(0, int(engine_memory(run, model).cache / cache_bytes_per_token(run, model)))


def host_bytes(run: PlannedRun) -> float:
    """Of a node's own memory: what engines take, and what the trainer offloads."""
    ranks = min(run.hardware.gpus_per_node, run.parallel.world_size)
    away = _ON_HOST * offloaded_parameters(run)
    away += activations(run, 0).on_host if run.options.offload else 0.0
    if run.hardware.layers != "cpu":
        away += sum(visiting_bytes(run, model, 0).moved for model in run.frozen)
    return engine_host_bytes(run) + ranks * away


def engine_host_bytes(run: PlannedRun) -> float:
    """Of a node's own memory: weights on their way to its engines.

    Through a folder each colocated engine gets the whole student in shared memory, all engines of
    the node at the same time; from GPU to GPU it takes nothing there. Asleep it keeps no weights.
    Separate ones read it from the run's folder.
    """
    weights = float(run.student.parameters * run.element)
    if run.hardware.layers == "cpu" or run.separate:
        return 0.0
    world = run.parallel.world_size
    engines = -(-run.rollout.num_engines * min(run.hardware.gpus_per_node, world) // world)
    return engines * weights if run.through_folder else 0.0


def saving_host_bytes(run: PlannedRun) -> float:
    """About what a save takes of a node's own memory, until it is written.

    What ``mcore.checkpoint.saving_bytes`` counts on each of its ranks. With the distributed
    optimizer every rank gathers the main weights and moments of its part of the model there, those
    of all replicas (``checkpoint_sharding = "fully_reshardable"``, as at least the last save is).
    Without, the first replica alone writes them; experts may be written by any.
    """
    p, held = run.parallel, run.trained_of(0)
    ranks = range(min(run.hardware.gpus_per_node, p.world_size))
    first = sum(rank // p.tensor % p.replicas == 0 for rank in ranks)
    writers = len(ranks) if p.distributed_optimizer else first
    has_main = p.distributed_optimizer or run.element == 2
    each = run.element + _FLOAT32 * (2 + has_main)
    return float(each * (writers * held.dense + len(ranks) * held.experts))


def checkpoint_bytes(run: PlannedRun) -> float:
    """About what one checkpoint takes on disk: what is trained, and its optimizer states."""
    states = 12 if run.element == 2 else 8
    return run.trained * (run.element + states)


def _signals(run: PlannedRun) -> float:
    """What the teachers say of a whole step; of several as if one had all rows, the largest."""
    if run.gives_states:
        return max(_states(run, teacher) for teacher in run.teachers)
    return max(_likeliest(run, teacher) for teacher in run.teachers)


def _states(run: PlannedRun, teacher: PlannedTeacher) -> float:
    return sum(_hidden_states(run, model) for model in teacher.named)


def _likeliest(run: PlannedRun, teacher: PlannedTeacher) -> float:
    """The most likely ids of a step's tokens, with their log-probs."""
    has_reference = teacher.reference is not None
    each = signal_bytes_per_token(teacher.config.signal_top_k, reference=has_reference)
    return float(run.work.step_loss_tokens * each)


def _copies(run: PlannedRun) -> float:
    """Of teachers with rows of their own: all that one said, whole rows, beside its parts.

    Hidden states that are reduced to the most likely ids are there twice, with the copy.
    """
    if not run.routed:
        return 0.0
    said = [_states(run, t) if t.gives_states else _likeliest(run, t) for t in run.teachers]
    reduced = 0 if run.gives_states else any(t.gives_states for t in run.teachers)
    return max(said) * (run.parallel.context + reduced)


def _arriving_output(run: PlannedRun) -> float:
    """An output layer from another layout, once more as it arrives while the models are built.

    What the ranks that send it hold meanwhile is not counted.
    """
    if not run.elsewhere:
        return 0.0
    return float(max(run.vocab_shard * m.shape.hidden * run.element for m in run.frozen))


def _average_output(run: PlannedRun) -> float:
    """A float32 student reads the average itself; adapters leave the output layer alone."""
    if not run.averages or run.lora is not None or run.element == _FLOAT32:
        return 0.0
    return float(run.vocab_shard * run.student.shape.hidden * run.element)


def _scorers(run: PlannedRun) -> Iterator[PlannedModel]:
    """The models that score on the ranks, with whatever weights."""
    for teacher in run.teachers:
        if teacher.gives_states:
            yield from teacher.named


def _hidden_states(run: PlannedRun, model: PlannedModel) -> float:
    return run.work.step_loss_tokens * model.shape.hidden * run.element


def _scoring_bytes(run: PlannedRun, model: PlannedModel) -> float:
    """While a frozen model scores; in a layout of its own with the states of a round on their way.

    They are sent as a copy, by the tensor-parallel ranks that share the work, and arrive as one.
    """
    own = run.scoring
    if not run.elsewhere:
        return _working_set(own, model)
    stages = own.parallel.pipeline
    batches = min(own.work.most_micro_batches, 1 if stages == 1 else ROUND_OF_STAGE * stages)
    arrived = own.parallel.replicas / run.parallel.replicas
    sent = 2 * min(1.0, max(arrived, run.parallel.tensor / own.parallel.tensor))
    states = batches * own.work.most_loss_tokens * model.shape.hidden * run.element
    return _working_set(own, model) + (sent + arrived) * states


def _working_set(run: PlannedRun, model: PlannedModel) -> float:
    """The residual stream and the widest layer output of one micro-batch, and as much again."""
    w = widths(model.shape, run.parallel, run.element, run.hardware.layers)
    routes = model.shape.experts.per_token if model.shape.experts else 1
    widest = max(w.fused_qkv, routes * (3 * w.ffn + (w.routed_hidden if routes > 1 else 0)))
    return run.work.rank_positions * run.element * (2 * w.hidden + 2 * widest)
