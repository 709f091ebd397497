"""Everything that the estimates are made from, checked as the trainer checks it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import (
    Config,
    LoraConfig,
    ModelParallelConfig,
    ParallelConfig,
    RolloutConfig,
    TeacherConfig,
)
from megatron_tropd.config.run import SELF, SEPARATE, reference_of
from megatron_tropd.convert.adapters import check_lora
from megatron_tropd.convert.checks import check_engine_shards, check_expert_parallel, check_layout
from megatron_tropd.convert.sizes import padded_vocab_size
from megatron_tropd.planning.hardware import Hardware
from megatron_tropd.planning.options import Offload, Options, options
from megatron_tropd.planning.parameters import PlannedModel, RankParameters, open_architecture
from megatron_tropd.planning.workload import PROMPT_TOKENS, Workload, workload


@dataclass(frozen=True)
class PlannedTeacher:
    """One of the run's teachers, with what it is measured against."""

    config: Config
    """The run with it alone."""
    model: PlannedModel
    reference: PlannedModel | None
    """If the loss reads it."""

    @property
    def named(self) -> tuple[PlannedModel, ...]:
        """Both."""
        return (self.model,) if self.reference is None else (self.model, self.reference)

    @property
    def gives_states(self) -> bool:
        """Whether it is run beside the student; else its most likely ids are read."""
        return self.config.loads_teacher

    @property
    def averages(self) -> bool:
        """Whether it is an average of the student's weights (``teacher.ema_decay``)."""
        return self.config.teacher.ema_decay is not None

    @property
    def is_student(self) -> bool:
        """Whether the student's own modules score: with the average, or without adapters."""
        is_self = self.config.teacher.placement == SELF
        return is_self and (self.averages or self.config.model.lora is not None)

    @property
    def frozen(self) -> tuple[PlannedModel, ...]:
        """The models that only score."""
        return self.named if self.gives_states and not self.is_student else ()


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A pair, its layout, one step's work, and the machines."""

    config: Config
    """Of the run; ``parallel``, ``rollout`` and ``options`` below replace its own."""
    parallel: ParallelConfig
    rollout: RolloutConfig
    student: PlannedModel
    teachers: tuple[PlannedTeacher, ...]
    """At least one."""
    work: Workload
    context_tokens: int | None
    """Assumed length of what a teacher reads in a prompt's place; None: the prompt."""
    hardware: Hardware
    options: Options
    """Megatron's own and ``teacher.offload``, replacing the config's."""
    element: int
    """Bytes of a weight or activation: 2 for bfloat16, 4 for float32."""

    @property
    def frozen(self) -> tuple[PlannedModel, ...]:
        """The models that only score: teachers and their references, if they are loaded."""
        return tuple(model for teacher in self.teachers for model in teacher.frozen)

    @property
    def named(self) -> tuple[PlannedModel, ...]:
        """All models that the config names."""
        return self.student, *(model for one in self.teachers for model in one.named)

    @property
    def teacher(self) -> PlannedModel:
        """The first of the teachers."""
        return self.teachers[0].model

    @property
    def gives_states(self) -> bool:
        """Whether the loss reads hidden states; else most likely ids, if a teacher has no more."""
        return all(teacher.gives_states for teacher in self.teachers)

    @property
    def scored_beside(self) -> int:
        """Models, beside the student, whose logits the loss makes of each token."""
        return max(len(one.named) for one in self.teachers) if self.gives_states else 0

    @property
    def averages(self) -> bool:
        """Whether an average of the student's weights is kept."""
        return any(teacher.averages for teacher in self.teachers)

    @property
    def routed(self) -> bool:
        """Whether teachers read rows of their own, and their words take the student's order."""
        return len(self.teachers) > 1 or self.context_tokens is not None

    @property
    def models(self) -> tuple[PlannedModel, ...]:
        """All models of the trainer."""
        return self.student, *self.frozen

    @property
    def padded_vocab(self) -> int:
        """Rows of all models' embeddings."""
        return _padded_vocab(tuple(m.key for m in self.named), self.parallel.tensor)

    @property
    def vocab_shard(self) -> int:
        """Rows of the output layers on one rank."""
        return self.padded_vocab // self.parallel.tensor

    @property
    def gradient_element(self) -> int:
        """Bytes of an element of the buffer of gradients."""
        return 4 if self.options.gradients_in_fp32 else self.element

    @property
    def last_stage(self) -> int:
        """Number of the stage that has the loss."""
        return self.parallel.pipeline - 1

    @property
    def separate(self) -> bool:
        """Whether engines have GPUs of their own."""
        return self.rollout.placement == "separate"

    @property
    def through_folder(self) -> bool:
        """Whether new weights are written to a file, in memory or in the run's folder."""
        folder = self.rollout.weight_transport == "folder"
        return self.separate or folder or self.hardware.layers == "cpu"

    @property
    def engine_nodes(self) -> int:
        """Nodes that only sample; an engine lies within one node."""
        if not self.separate:
            return 0
        on_a_node = self.hardware.gpus_per_node // self.rollout.engine_tensor_parallel
        return -(-self.rollout.num_engines // on_a_node)

    @property
    def training_nodes(self) -> int:
        """Nodes that train."""
        return -(-self.parallel.world_size // self.hardware.gpus_per_node)

    @property
    def gpus(self) -> int:
        """All GPUs: the ranks', and those of separate engines."""
        apart = self.rollout.num_engines * self.rollout.engine_tensor_parallel
        return self.parallel.world_size + (apart if self.separate else 0)

    @property
    def elsewhere(self) -> bool:
        """Whether the teacher has a layout of its own ([teacher.parallel])."""
        return self.config.teacher.parallel is not None

    @property
    def can_move(self) -> bool:
        """Whether the teacher could have a layout of its own: one model that reads the prompts."""
        resident = self.teacher_config.placement == TeacherConfig.placement
        return not self.config.teachers and resident and self.context_tokens is None

    @property
    def teacher_config(self) -> TeacherConfig:
        """Settings of the first teacher."""
        return self.teachers[0].config.teacher

    @cached_property
    def scoring(self) -> "PlannedRun":
        """The run as teachers see it: in a layout of their own, or with other prompts."""
        own = self.config.teacher.parallel
        if own is not None:
            parallel = _over(own, self.parallel.world_size)
            return replace(self, parallel=parallel, work=self._work_of(parallel, filled=True))
        if self.context_tokens is not None:
            return replace(self, work=self._work_of(self.parallel, prompt=self.context_tokens))
        return self

    def scoring_stages(self, stage: int) -> range:
        """Stages of the frozen models on the ranks of one of the student's."""
        world, scoring = self.parallel.world_size, self.scoring.parallel
        mine, theirs = world // self.parallel.pipeline, world // scoring.pipeline
        return range(stage * mine // theirs, ((stage + 1) * mine - 1) // theirs + 1)

    def frozen_on(self, model: PlannedModel, stage: int) -> int:
        """Parameters of a frozen model on the fullest rank of one of the student's stages.

        In a layout of its own its output layer lies on the student's last stage alone.
        """
        scoring, held = self.scoring, []
        if not self.elsewhere:
            return self.parameters_of(model, stage).total
        for number in self.scoring_stages(stage):
            total = scoring.parameters_of(model, number).total
            copied = not model.shape.tied or number > 0
            gone = copied and number == scoring.last_stage
            held.append(total - gone * scoring.vocab_shard * model.shape.hidden)
        output = self.vocab_shard * model.shape.hidden if stage == self.last_stage else 0
        return max(held) + output

    def _work_of(
        self, parallel: ParallelConfig, *, filled: bool = False, prompt: int | None = None
    ) -> Workload:
        return workload(
            self.config,
            parallel,
            filled=filled,
            rounded_to=row_multiple(self.hardware) * parallel.context,
            prompt_tokens=prompt or self.work.prompt,
            response_tokens=self.work.mean_response,
        )

    def parameters_of(self, model: PlannedModel, stage: int) -> RankParameters:
        """Parameters of a model on one rank of a stage."""
        return model.on_rank(self.parallel, stage, self.padded_vocab)

    @property
    def lora(self) -> LoraConfig | None:
        """The student's adapters, if it has any."""
        return self.config.model.lora

    def trained_of(self, stage: int) -> RankParameters:
        """Those of the student's parameters on one rank of a stage that are trained."""
        if self.lora is None:
            return self.parameters_of(self.student, stage)
        return self.student.adapters_on_rank(self.lora, self.parallel, stage)

    def student_of(self, stage: int) -> int:
        """All parameters of the student on one rank of a stage, adapters included."""
        own = self.parameters_of(self.student, stage).total
        return own if self.lora is None else own + self.trained_of(stage).total

    @property
    def trained(self) -> int:
        """Parameters of the student that are trained."""
        return self.student.parameters if self.lora is None else self.student.adapters(self.lora)

    def laid_out(
        self,
        parallel: ParallelConfig,
        rollout: RolloutConfig,
        teacher: ModelParallelConfig | None = None,
    ) -> "PlannedRun":
        """The same with another layout and other engines.

        Args:
            teacher: layout of the teacher's own; None: the student's.

        Raises:
            ConfigError: the trainer would refuse it.
        """
        of_teacher = self.config.teacher
        if teacher != of_teacher.parallel:
            of_teacher = replace(of_teacher, parallel=teacher)
        # Is checked as the trainer's is.
        config = replace(self.config, parallel=parallel, rollout=rollout, teacher=of_teacher)
        work = self._work_of(parallel)
        other = replace(self, config=config, parallel=parallel, rollout=rollout, work=work)
        _check(other)
        return other


def plan_run(
    config: Config,
    hardware: Hardware,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    response_tokens: float | None = None,
    context_tokens: int | None = None,
) -> PlannedRun:
    """Read the models' config.json files and check the layout.

    Args:
        config: the run; texts and weights it names are not read.
        response_tokens: assumed average length of a response; None: the longest.
        context_tokens: assumed length of what a teacher reads in a prompt's place; None: the
            longest that a micro-batch and the models have room for.

    Raises:
        InputError: a model's config.json is missing, unreadable or not supported.
        ConfigError: the trainer would refuse the settings, or a length is impossible.
    """
    if config.teacher.ranks is not None:
        raise ConfigError(
            "A plan counts models on the student's ranks, found teacher.placement = "
            f'"{SEPARATE}", whose teacher has ranks that are not planned. For the student\'s, plan '
            'a copy of the file with placement = "served" and an address in [teacher], without '
            "ranks and [teacher.parallel]."
        )
    on_cpu = hardware.layers == "cpu"
    kind = config.model.dtype
    if kind == "auto":
        kind = "float32" if on_cpu else "bfloat16"
    teachers = tuple(_teacher(who, alone) for who, alone in config.by_teacher.items())
    run = PlannedRun(
        config=config,
        parallel=config.parallel,
        rollout=config.rollout,
        student=open_architecture(config.model.student, "student"),
        teachers=teachers,
        context_tokens=_context_tokens(config, teachers, context_tokens),
        work=workload(
            config,
            config.parallel,
            rounded_to=row_multiple(hardware) * config.parallel.context,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
        ),
        hardware=hardware,
        options=options(config.megatron, teacher=_offload(teachers)),
        element=2 if kind == "bfloat16" else 4,
    )
    _check(run)
    return run


@lru_cache(maxsize=256)
def _over(own: ModelParallelConfig, world_size: int) -> ParallelConfig:
    return own.over(world_size)


def _teacher(who: str, alone: Config) -> PlannedTeacher:
    """Read the models of one of the run's teachers."""
    named, reference = alone.reference, None
    if named:
        reference = open_architecture(named, reference_of(who))
    return PlannedTeacher(alone, open_architecture(alone.model.teacher, who), reference)


def _offload(teachers: Sequence[PlannedTeacher]) -> Offload:
    """Where teachers wait: of several the setting that needs more of the GPU is taken for all."""
    wanted = {one.config.teacher.offload for one in teachers if one.frozen}
    order: tuple[Offload, ...] = ("none", "host", "host_by_layer")
    return next((where for where in order if where in wanted), "none")


def _context_tokens(
    config: Config, teachers: Sequence[PlannedTeacher], asked: int | None
) -> int | None:
    """Length of a prompt as the teachers read it, if one has its own (``teacher.context``)."""
    if not any(one.config.teacher.context for one in teachers):
        if asked is not None:
            raise ConfigError(
                "--context-tokens is the length of what teacher.context makes, found no "
                "teacher.context. Leave one of the two out."
            )
        return None
    if asked is not None and asked < 1:
        raise ConfigError(f"--context-tokens must be at least 1, found {asked}.")
    held = min(one.model.shape.context for one in teachers)
    multiple = config.pad_multiple
    room = min(config.train.tokens_per_micro_batch // multiple * multiple + 1, held)
    return asked or max(1, room - config.rollout.max_new_tokens)


def row_multiple(hardware: Hardware) -> int:
    """What the trainer rounds lengths of rows up to, on each rank; a test compares them."""
    return 1 if hardware.layers == "cpu" else 128


@lru_cache(maxsize=256)
def _padded_vocab(models: tuple[str, ...], tensor: int) -> int:
    return padded_vocab_size(*map(json.loads, models), tensor=tensor)


def _check(run: PlannedRun) -> None:
    if run.lora is not None:
        grouped = run.hardware.layers == "transformer_engine"
        chosen = run.config.megatron.model.get("moe_grouped_gemm", grouped)
        check_lora(run.student.shape, run.lora, grouped_experts=bool(chosen))
    for model in run.models:
        own = run.scoring if model in run.frozen else run
        check_layout(model.shape, own.parallel, who=model.who)
    for model in run.named:
        read = run.work if model is run.student else run.scoring.work
        if read.longest > model.shape.context:
            raise ConfigError(
                f"A prompt of {read.prompt} tokens and rollout.max_new_tokens = "
                f"{run.work.longest_response} exceed the {model.who}'s context of "
                f"{model.shape.context} tokens. Lower --prompt-tokens (--context-tokens of a "
                "teacher with prompts of its own) or rollout.max_new_tokens."
            )
    shapes = [model.shape for model in run.models]
    check_expert_parallel(run.parallel, shapes[:1] if run.elsewhere else shapes)
    if run.elsewhere:
        check_expert_parallel(run.scoring.parallel, shapes[1:])
    check_engines(run)


def check_engines(run: PlannedRun) -> None:
    """Check that the rollout engines find their GPUs, and that their GPUs can share the student.

    Raises:
        ConfigError: one of the two is not so.
    """
    if run.separate:
        _check_separate(run)
    else:
        _check_colocated(run)
    gpus = run.rollout.engine_tensor_parallel
    if gpus > 1 and run.hardware.layers == "cpu":
        raise ConfigError(
            f"rollout.engine_tensor_parallel must be 1 without CUDA, found {gpus}. Set it to 1."
        )
    check_engine_shards(run.student.shape, gpus, who="the student")


def _check_colocated(run: PlannedRun) -> None:
    world, engines = run.parallel.world_size, run.rollout.num_engines
    gpus, node = run.rollout.engine_tensor_parallel, run.hardware.gpus_per_node
    if run.rollout.asks_teacher and run.hardware.layers != "cpu":
        raise ConfigError(
            f'rollout.behaviour = "{run.rollout.behaviour}" is built for engines without CUDA. '
            'Set rollout.behaviour = "student".'
        )
    if run.rollout.steps_ahead and run.hardware.layers != "cpu":
        raise ConfigError(
            'rollout.steps_ahead = 1 needs rollout.placement = "separate": colocated engines sleep '
            "while the trainer works. Change one of the two."
        )
    if world % engines:
        raise ConfigError(
            f"rollout.num_engines = {engines} must divide the {world} ranks. Change one of the two."
        )
    block = world // engines
    if gpus > min(block, node):
        raise ConfigError(
            f"rollout.engine_tensor_parallel = {gpus} exceeds the {block} GPUs that each of "
            f"{engines} engines has, or the {node} of a node. Lower rollout.num_engines or "
            "rollout.engine_tensor_parallel."
        )
    for first in range(0, world, block):
        if first % node + gpus > node:
            raise ConfigError(
                f"Engine {first // block} starts at GPU {first % node} of a node of {node} and "
                f"cannot have rollout.engine_tensor_parallel = {gpus} GPUs there. Choose "
                "rollout.num_engines so that engines do not cross nodes."
            )


def _check_separate(run: PlannedRun) -> None:
    gpus, node = run.rollout.engine_tensor_parallel, run.hardware.gpus_per_node
    if gpus > node:
        raise ConfigError(
            f"rollout.engine_tensor_parallel = {gpus} exceeds the {node} GPUs of a node. Lower it."
        )
