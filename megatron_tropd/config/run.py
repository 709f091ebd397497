"""Every setting of a run: frozen dataclasses, read from TOML, checked once, written as JSON.

Needs only the standard library, so a config can be checked on a login node without torch.
Paths in a TOML file are relative to the file; paths given as ``key=value`` overrides and
``run.dir`` are relative to the current directory. Unknown keys are errors.
"""

import dataclasses
import datetime
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_tropd.base import deterministic
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import check_part
from megatron_tropd.base.text_files import read_toml
from megatron_tropd.config.loss import LossSettings, loss_defaults, preset
from megatron_tropd.config.loss_of_0_1 import new_form, refuse_old_form
from megatron_tropd.config.megatron import MegatronConfig
from megatron_tropd.config.settings import (
    Amount,
    Anything,
    Between,
    Count,
    Number,
    Positive,
    Range,
    Settings,
    Share,
    nearest,
    require_plain,
)

PATH = {"path": True}  # metadata of the fields that name an input file or folder
HUB_MODEL = "hf://"
"""Begins the name of what the Hugging Face hub has, which is no path: ``hf://OWNER/NAME``."""
HUB = f"{HUB_MODEL}datasets/"
"""Begins the name of a data set there."""
SELF = "self"
"""``teacher.placement``: the student's own weights."""
SEPARATE = "separate"
"""``teacher.placement``: ranks of its own, after the student's."""
TEACHER = "teacher"
"""What messages call the teacher; one of several is "teacher NAME"."""
MULTI_TURN = "multi_turn"
"""``rollout.mode`` of episodes with an environment."""
STUDENT = "student"
"""``teacher.reference``: the weights that the student starts from."""
_SEVERAL = ("teachers", "tasks")
"""Tables of which a config has any number."""
_SOURCES, _MODES = "megatron_tropd.teacher", "megatron_tropd.rollout.episodes"
"""Packages whose modules teacher.placement and rollout.mode name."""
CACHED_TOP_K = 64
"""``teacher.cache_top_k`` of a loss that needs no more."""
_GREEDY = "On-policy samples are drawn at random (evaluation is greedy by itself)."
Temperature = Annotated[float, Range(0, ends="(]", hint=_GREEDY)]
Moment = Annotated[float, Range(0, 1, "[)")]
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
_GONE = {
    ("rollout.engine_memory", None): "is now two settings, one for each unit: "
    "rollout.engine_gpu_share (share of each GPU's memory) and rollout.engine_cpu_kv_gib (GiB of "
    "KV cache without CUDA). Set the one that your machine needs.",
    ("teacher.source", None): "is now teacher.placement, with the same values. Rename it.",
    ("rollout.weight_transport", "direct"): '= "direct" is no longer there: servers read new '
    "weights from the run folder. Remove the line.",
}
"""Keys, and values of keys, that earlier versions had: what to write now."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_name(text: str) -> bool:
    """Whether a text may be part of file names and of names of metrics."""
    return text.replace("-", "").replace("_", "").isalnum()


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings, section="model.lora"):
    """Low-rank adapters beside the student's linear layers; its own weights are frozen."""

    rank: Count = 16
    """Columns of an adapter: W + alpha / rank B A, with A [rank, in] and B [out, rank]."""
    alpha: Positive = 32.0
    """An adapter is scaled by alpha / rank."""
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.0
    """Share of an adapter's inputs that is dropped while it is trained."""
    targets: tuple[LoraTarget, ...] = typing.get_args(LoraTarget)
    """Megatron's linear layers that get adapters. linear_fc1 and linear_fc2 of a mixture are those
    of its experts."""

    def _check_together(self) -> None:
        found = list(self.targets)
        _require(
            bool(found) and len(set(found)) == len(found),
            f"model.lora.targets must name at least one layer, and each once, found {found}.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings, section="model"):
    """The pair: two model folders, each an HF folder (config.json, *.safetensors, tokenizer) or a
    Megatron checkpoint made by ``tropd convert``; or ``hf://OWNER/NAME``, a model of the hub.
    """

    student: str = field(metadata=PATH)
    """Folder of the student: architecture and first weights."""
    teacher: str = field(default="", metadata=PATH)
    """Folder of the teacher. Frozen. Same tokenizer as the student (checked). Left out if there are
    several, in [[teachers]]."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of both models. auto: bfloat16 with CUDA, float32 without."""
    lora: LoraConfig | None = None
    """[model.lora]: train adapters alone (docs/lora.md). None: train all weights."""


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig(Settings, section="teacher.parallel"):
    """How one copy of a model is laid out, over tensor x context x pipeline ranks.

    As [teacher.parallel]: a layout of the teacher's own on the ranks of the run. How many copies of
    it there are follows.
    """

    tensor: Count = 1
    """Tensor-parallel ranks; without [teacher.parallel] of student and teacher."""
    pipeline: Count = 1
    """Pipeline stages; without [teacher.parallel] of student and teacher."""
    context: Count = 1
    """Ranks that share each row of tokens, for long ones: of 2 x context equal parts of it a rank
    computes one from the front and its mirror image from the back."""
    expert: Count = 1
    """Ranks that share the experts of a mixture, taken from the replicas; divides context x data,
    or, with expert_tensor = 1, tensor x context x data."""
    expert_tensor: Count | None = None
    """Tensor-parallel ranks of each expert: 1 keeps experts whole, so routed tokens are sent once
    and not gathered over the tensor-parallel ranks too. None: tensor."""
    uneven_stages: bool = False
    """Accept layers that pipeline does not divide: the first stages take one more."""
    sequence_parallel: bool = False
    """Shard activations between the tensor-parallel regions along the sequence."""

    def _check_together(self) -> None:
        _require(
            self.expert_tensor in (None, 1, self.tensor),
            f"{self.key('expert_tensor')} must be 1 or {self.key('tensor')} = {self.tensor}, found "
            f"{self.expert_tensor}.",
        )
        _require(
            self.tensor > 1 or not self.sequence_parallel,
            f"{self.key('sequence_parallel')} = true needs {self.key('tensor')} of at least 2, "
            f"found 1. Raise {self.key('tensor')} or set sequence_parallel = false.",
        )

    def over(
        self,
        world_size: int,
        whose: str = "of the run ([parallel]: tensor x context x pipeline x data)",
    ) -> "ParallelConfig":
        """The layout with as many copies of the model as there are ranks for.

        Args:
            world_size: ranks.
            whose: how a message calls them.

        Raises:
            ConfigError: they do not divide the ranks.
        """
        ranks = self.tensor * self.context * self.pipeline
        _require(
            world_size % ranks == 0,
            "[teacher.parallel]: a copy of the teacher takes tensor x context x pipeline = "
            f"{self.tensor} x {self.context} x {self.pipeline} = {ranks} ranks, which must divide "
            f"the {world_size} ranks {whose}. Change one of the two.",
        )
        return TeacherLayout(**dataclasses.asdict(self), data=world_size // ranks)

    @property
    def row_shards(self) -> int:
        """Equal parts that the axes cut a row into."""
        shards = self.tensor if self.sequence_parallel else 1
        return shards if self.context == 1 else 2 * self.context * shards

    @property
    def shards_of_expert(self) -> int:
        """Tensor-parallel ranks of each expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(ModelParallelConfig, section="parallel"):
    """How the ranks are laid out. World size = tensor x context x pipeline x data."""

    virtual_pipeline: Count = 1
    """Parts of the layers that each stage holds, in turns with the others (Megatron's interleaved
    schedule): idle time is divided by it, and micro-batches are a multiple of pipeline."""
    data: Count = 1
    """Data-parallel replicas of the student."""
    distributed_optimizer: bool = False
    """Shard optimizer states over the data-parallel ranks."""

    def _check_together(self) -> None:
        super()._check_together()
        _require(
            self.pipeline > 1 or self.virtual_pipeline == 1,
            f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline of at "
            "least 2, found 1: one stage has nobody to take turns with. Raise parallel.pipeline or "
            "set virtual_pipeline = 1.",
        )
        whole = self.shards_of_expert < self.tensor
        sharers = self.replicas * (self.tensor if whole else 1)
        context = "context x " if self.context > 1 else ""
        _require(
            sharers % self.expert == 0,
            f"{self.key('expert')} = {self.expert} must divide {self._prefix}"
            f"{'tensor x ' if whole else ''}{context}data, found {sharers}: the replicas share the "
            "experts. Change one of the two.",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks (processes) of the run."""
        return self.tensor * self.pipeline * self.replicas

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, if experts are not counted: for other tokens."""
        return self.context * self.data

    @property
    def num_chunks(self) -> int:
        """Parts that the layers are cut into, one after the other."""
        return self.pipeline * self.virtual_pipeline

    @property
    def batch_multiple(self) -> int:
        """What the number of micro-batches of a step is a multiple of."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.tensor * self.replicas // (self.shards_of_expert * self.expert)


class TeacherLayout(ParallelConfig, section="teacher.parallel"):
    """The teacher's own layout, with the data-parallel replicas that follow from the world."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, section="data"):
    """What of a file or data set is read, and under which names (docs/prompts.md)."""

    subset: str = ""
    """Configuration of a data set that has several, such as "main"."""
    split: str = ""
    """"train", "test", ...: needed for a data set that has several."""
    fields: dict[str, str] = field(default_factory=dict)
    """Our name = theirs: {prompt = "question", answer = "reward_model.ground_truth"}; points lead
    into tables and lists."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Settings, section="rollout"):
    """How a line of a prompts file becomes token ids (docs/prompts.md)."""

    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template ("messages" always are)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template reads beside the messages: {enable_thinking = false}, tools, or
    chat_template, the name of one of several templates. A line's own keys come first."""
    chat_template_date: str | None = None
    """The date (YYYY-MM-DD) that a template which reads the clock is told. None: the day the run
    begins, also after a resumption."""
    system_prompt: str = ""
    """First message of every conversation that has no system message of its own."""
    prompt_template: str = ""
    """Jinja text that makes the prompt of a line's fields: "{{ prompt }} Think step by step."
    Empty: the line's prompt as it is."""

    def _check_together(self) -> None:
        require_plain(self.chat_template_kwargs, "rollout.chat_template_kwargs")
        date = self.chat_template_date
        _require(
            date is None or _is_date(date),
            f"rollout.chat_template_date must look like 2026-01-31, found {date!r}.",
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PromptConfig, section="rollout"):
    """What the student samples at every step, and the engine that samples it."""

    prompts: str = field(default="", metadata=PATH)
    """JSON lines or a JSON array, of {"prompt": str} or {"messages": [...]}; or such rows of a
    Parquet file, of a folder, or of "hf://datasets/OWNER/NAME" (docs/prompts.md)."""
    data: DataConfig = field(default_factory=DataConfig)
    """What of them is read: split, and names of fields. Both are left out if there are several
    tasks, in [[tasks]]."""
    max_new_tokens: Count
    """Longest response in tokens, a teacher prefix included."""
    first_new_tokens: Count | None = None
    """The longest response of the first step; it grows linearly to max_new_tokens, which it has
    from step growth_steps (0-based) on. None: max_new_tokens in every step."""
    growth_steps: Number = 0
    """Steps in which first_new_tokens grows to max_new_tokens."""
    prompts_per_step: Count = 128
    """Prompts of one optimizer step (global)."""
    samples_per_prompt: Count = 4
    """Responses sampled for each prompt, each with a seed of its own."""
    temperature: Temperature = 1.0
    """Sampling temperature. Log-probs in the loss are always at temperature 1."""
    top_p: Share = 1.0
    """Nucleus of the sampling distribution; 1 samples the whole vocabulary."""
    stop_token_ids: tuple[Number, ...] = ()
    """Further ids that end a response, beside every EOS of the student's folder (tokenizer,
    generation_config.json, config.json)."""
    behaviour: Literal["student", "blended", "mixture", "skd", "cooled"] = "student"
    """What samples for the first warmup_steps steps, then the student (docs/behaviour.md).
    blended: as near to the teacher as KL(behaviour || student) <= epsilon allows (TRB); mixture:
    teacher_share of the teacher's probabilities; skd: the student's token if it is in the teacher's
    top-k, else one of the teacher's; cooled: the student at warmup_temperature."""
    warmup_steps: Number = 50
    """Steps that behaviour samples (K)."""
    warmup_schedule: Literal["linear", "constant"] = "linear"
    """linear: in step k epsilon (1 - k/K), and so teacher_share and the distance of
    warmup_temperature; constant: as they are set. skd knows no distance."""
    epsilon: Amount = 0.02
    """blended: nats at every token; 0: the student."""
    teacher_share: Annotated[float, Range(0, 1)] = 0.2
    """mixture: a of a p + (1 - a) q; 1: the teacher."""
    teacher_top_k: Count = 25
    """skd: how many of the teacher's tokens the student's is kept for."""
    warmup_temperature: Temperature = 0.7
    """cooled: temperature of the first step."""
    draft_tokens: Count = 6
    """blended, mixture, skd: tokens that the student drafts for each pass of the teacher."""
    mode: str = "single_turn"
    """How a prompt becomes a sequence: "single_turn" (the student answers once, perhaps after a
    teacher prefix), "multi_turn" (it talks to [environment]), or "package.module:attribute" of your
    own (docs/extending.md)."""
    recorded: str | None = field(default=None, metadata=PATH)
    """Train on these rollouts in place of new samples: a file that `tropd rollouts` made of the
    same prompts, or a folder of rounds (docs/recorded_rollouts.md). None: sample."""
    filter_overlong_prompts: bool = False
    """Leave out prompts that are too long for the models' context, instead of refusing the file."""
    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: engines share the trainer's devices and sleep while it trains; separate: each is a
    server of its own (``tropd serve``, docs/serving.md)."""
    num_engines: Count = 1
    """colocated: engines on the first ranks of equal blocks of the world, which it divides;
    separate: servers."""
    steps_ahead: Literal[0, 1] = 0
    """1: sample for the next step while this one trains, so samples are one step old."""
    weight_transport: Literal["auto", "folder"] = "auto"
    """How engines get new weights. auto: colocated on CUDA from GPU to GPU, else as folder; folder:
    colocated through shared memory, servers from the run folder (docs/serving.md)."""
    engine_tensor_parallel: Count = 1
    """GPUs of one engine. More than 1 needs CUDA."""
    engine_gpu_share: Between = 0.4
    """Share of each GPU's memory the engine may take."""
    engine_cpu_kv_gib: Positive = 0.4
    """GiB of KV cache of an engine without CUDA."""
    max_num_seqs: Count | None = None
    """Most sequences an engine decodes together. None: vLLM's default (256; 1024 on a GPU of 70 GiB
    or more that is no A100)."""
    max_num_batched_tokens: Count | None = None
    """Most tokens in one forward pass of an engine, prompts included. None: vLLM's default (8192,
    or 16384 on such a GPU; without CUDA what one prompt needs)."""
    max_engine_gap: Amount | None = None
    """Largest mean difference of the log-probs that engine and trainer give the samples of the
    first step, in nats; above it the run stops. None: 0.001 in float32, 0.1 in bfloat16 (far above
    round-off); 0: never."""

    def _check_together(self) -> None:
        super()._check_together()
        sequences, tokens = self.max_num_seqs, self.max_num_batched_tokens
        _require(
            sequences is None or tokens is None or sequences <= tokens,
            f"rollout.max_num_batched_tokens must be at least rollout.max_num_seqs = {sequences}, "
            f"for each sequence decodes a token, found {tokens}.",
        )
        first = self.first_new_tokens
        _require(
            first is None or first <= self.max_new_tokens,
            f"rollout.first_new_tokens must be at most rollout.max_new_tokens = "
            f"{self.max_new_tokens}, found {first}.",
        )
        _require(
            (first is None) == (self.growth_steps == 0),
            "rollout.first_new_tokens and rollout.growth_steps go together, found "
            f"{first} and {self.growth_steps}. Set both or neither.",
        )
        if self.asks_teacher:
            self._check_blend()

    def new_tokens_at(self, step: int) -> int:
        """Longest response of a step (0-based), a teacher prefix included."""
        first, longest = self.first_new_tokens, self.max_new_tokens
        if first is None or step >= self.growth_steps:
            return longest
        return first + (longest - first) * step // self.growth_steps

    @property
    def asks_teacher(self) -> bool:
        """Whether some steps are sampled with the teacher."""
        far = {"blended": self.epsilon, "mixture": self.teacher_share, "skd": 1}
        return self.warmup_steps > 0 and far.get(self.behaviour, 0) > 0

    def _check_blend(self) -> None:
        supported = {
            "placement": "colocated",
            "steps_ahead": 0,
            "temperature": 1.0,
            "top_p": 1.0,
            "mode": "single_turn",
        }
        for name, value in supported.items():
            found = getattr(self, name)
            _require(
                found == value,
                f'rollout.behaviour = "{self.behaviour}" needs rollout.{name} = '
                f"{json.dumps(value)}, found {json.dumps(found)}: it is built for colocated "
                "engines, on policy, one turn, at temperature 1. Change one of the two.",
            )


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Settings, section="guidance"):
    """Off-policy guidance: some trajectories start with a prefix written by the teacher."""

    responses: str | None = field(default=None, metadata=PATH)
    """JSON lines written by `tropd responses`. None: no guidance."""
    prefixed_per_prompt: Number = 1
    """How many of a prompt's samples carry a teacher prefix."""
    prefix_length: Literal["longest", "uniform"] = "longest"
    """longest: floor(alpha(t) x response length); uniform: a keyed draw between 0 and that."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """alpha(t), the share of the response a prefix may have: half a cosine from 1 to 0 over the
    steps, or always 1 (GKD's off-policy share: the teacher's response, then the student)."""
    beta: Amount = 0.001
    """Weight of -log q(x) on teacher tokens."""
    golden_field: str | None = None
    """Field of a prompt's line with its golden answer, a text (docs/losses.md): in every step it
    takes the place of the prompt's last sample. None: all are sampled."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings, section="train"):
    """Optimisation, by Megatron-Core's optimizer, scheduler and schedules."""

    steps: Count
    """Optimizer steps of the run (T of the prefix schedule)."""
    lr: Positive = 5e-6
    """Peak learning rate of Adam."""
    min_lr: Amount = 0.0
    """Learning rate at the end of a decaying schedule."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: Number = 0
    """Steps of linear warm-up from 0."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay."""
    adam_betas: tuple[Moment, Moment] = (0.9, 0.95)
    """Adam's two averaging constants."""
    adam_eps: Positive = 1e-8
    """Adam's epsilon."""
    clip_grad: Amount = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    tokens_per_micro_batch: Count = 16384
    """Padded tokens one micro-batch may hold on one data-parallel rank, over its context-parallel
    ranks (memory knob)."""
    seed: Anything = 1234
    """Keys every random draw: prompt order, sampling, trust-region mask, prefixes."""

    def _check_together(self) -> None:
        _require(
            self.min_lr <= self.lr,
            f"train.min_lr must be between 0 and train.lr = {self.lr}, found {self.min_lr}.",
        )
        _require(
            self.warmup_steps <= self.steps,
            f"train.warmup_steps must be in 0..{self.steps} (train.steps), found "
            f"{self.warmup_steps}.",
        )


@dataclass(frozen=True, kw_only=True)
class GraderConfig(Settings, section="grader"):
    """What says whether an answer is right (docs/graders.md)."""

    name: str = "marked"
    """marked: the answer after a mark, by our own rules; math: the same and math-verify; choice,
    exact, last_number; regex: what pattern finds; code: runs the model's program by unit tests; or
    "package.module:function" of your own."""
    pattern: str = ""
    """regex: its last match is the answer, or that match's first group."""
    timeout_seconds: Positive = 10.0
    """Longest grading of one answer outside of this process; for code, of each test."""
    memory_mib: Count = 2048
    """Address space of a process that grades, and of a program it runs; your own has no limit."""

    def _check_together(self) -> None:
        _require(
            (self.name == "regex") == bool(self.pattern),
            f'grader.pattern is for grader.name = "regex", which needs one, found grader.name = '
            f"{self.name!r} and the pattern {self.pattern!r}.",
        )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"grader.pattern = {self.pattern!r} is not valid: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class EvaluationSet(Settings, section="evaluation.sets"):
    """One of several sets of held-out problems, [[evaluation.sets]] (docs/evaluation.md). What is
    left out is as [evaluation], [grader] and [rollout] have it.
    """

    name: str
    """Letters, digits, - and _: what records, files and `tropd compare` call it."""
    problems: str = field(metadata=PATH)
    """As evaluation.problems."""
    data: DataConfig = field(default_factory=DataConfig)
    """What of them is read."""
    num_problems: Count | None = None
    """How many of them, from the top of the file."""
    samples: Count | None = None
    """Answers to each."""
    temperature: Amount | None = None
    """Of sampling; 0: greedy."""
    top_p: Share | None = None
    """Nucleus of sampling."""
    max_new_tokens: Count | None = None
    """Longest answer."""
    grader: GraderConfig | None = None
    """What grades it."""
    apply_chat_template: bool | None = None
    """Whether prompts are wrapped in the tokenizer's chat template."""
    system_prompt: str | None = None
    """First message of a conversation without one of its own."""
    prompt_template: str | None = None
    """Jinja text that makes the prompt of a line's fields."""
    of_task: str | None = None
    """Name of a task of [[tasks]]. The set takes that task's grader, form of prompts, longest
    answer and teacher, unless it has its own."""

    def prompts_as(self, rollout: PromptConfig) -> PromptConfig:
        """Return how its lines become token ids."""
        own = {f.name: getattr(self, f.name, None) for f in fields(PromptConfig)}
        given = {name: value for name, value in own.items() if value is not None}
        shared = {f.name: getattr(rollout, f.name) for f in fields(PromptConfig)}
        return PromptConfig(**shared | given)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings, section="evaluation"):
    """What is measured on held-out problems, before, during and after the run."""

    problems: str | None = field(default=None, metadata=PATH)
    """Held-out problems, in any form of rollout.prompts, with an "answer" each for exact_match.
    None: none."""
    data: DataConfig = field(default_factory=DataConfig)
    """What of them is read; nothing of rollout.data."""
    task: Literal["exact_match", "reverse_kl"] = "exact_match"
    """exact_match: answers graded, greedy ones or samples (temperature); reverse_kl: exact
    KL(student || teacher) per token on fresh student samples, measured with transformers."""
    num_problems: Count = 500
    """How many of them, from the top of the file."""
    teacher: bool = True
    """exact_match: also grade the teacher, once, before the models are built."""
    every: Number = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    max_new_tokens: Count | None = None
    """Longest answer; None: rollout.max_new_tokens."""

    sets: tuple[EvaluationSet, ...] = ()
    """[[evaluation.sets]]: several sets, in place of problems and data."""
    samples: Count = 1
    """exact_match: answers to each problem, k of avg@k and pass@k."""
    temperature: Amount = 0.0
    """exact_match: of sampling; 0: greedy."""
    top_p: Share = 1.0
    """exact_match: nucleus of sampling."""
    seed: Anything | None = None
    """Keys the samples, with problem and number of the sample. None: train.seed."""
    before: bool = True
    """Whether the student is measured before the first step."""
    after: bool = True
    """Whether it is measured after the last step."""
    keep_answers: bool = True
    """Keep all answers and verdicts in the run's folder evaluations, for `tropd compare`."""
    teacher_results: str | None = field(default=None, metadata=PATH)
    """A folder in which runs share what the teacher reached, by the digests of teacher and set.
    None: each run measures its teacher once."""

    def _check_together(self) -> None:
        names = [each.name for each in self.sets]
        for name in names:
            _require(
                _is_name(name),
                f"evaluation.sets.name must have letters, digits, - and _ alone, found {name!r}.",
            )
            _require(names.count(name) == 1, f"evaluation.sets.name: {name} is there twice.")
        _require(
            not self.sets or self.problems is None,
            "evaluation.problems is for a single set, found [[evaluation.sets]] beside it. Make it "
            "one of them.",
        )
        self._check_sampling(self)
        for each in self.sets:
            self._check_sampling(each)

    def _check_sampling(self, each: "EvaluationConfig | EvaluationSet") -> None:
        names = ("samples", "temperature", "top_p")
        given: dict[str, Any] = {
            name: getattr(self if getattr(each, name) is None else each, name) for name in names
        }
        of_set = f" of {each.name}" if isinstance(each, EvaluationSet) else ""
        greedy = given["temperature"] == 0
        found = f"{given['samples']} and top_p = {given['top_p']}"
        _require(
            not greedy or (given["samples"] == 1 and given["top_p"] == 1),
            f"evaluation.samples = {found}{of_set} beside temperature = 0: greedy answers are all "
            "the same. Set a temperature above 0.",
        )
        _require(
            self.task == "exact_match" or (greedy and given["samples"] == 1),
            f'evaluation.task = "{self.task}" reads one sample at temperature 1, found '
            f"others{of_set}. Leave samples, temperature and top_p out.",
        )

    @property
    def measures(self) -> bool:
        """Whether there are held-out problems."""
        return self.problems is not None or bool(self.sets)


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Settings, section="tasks"):
    """One of several tasks that a run is trained on, [[tasks]] (docs/tasks.md). What is left out is
    as [rollout] and [grader] have it; a field of the same name as one of [rollout] takes its
    place.
    """

    name: str
    """Letters, digits, - and _: what metrics and evaluation.sets.of_task call it."""
    prompts: str = field(metadata=PATH)
    """As rollout.prompts, which is left out."""
    weight: Positive = 1.0
    """Its share of rollout.prompts_per_step is this over the sum of all."""
    data: DataConfig = field(default_factory=DataConfig)
    """What of the prompts is read."""
    grader: GraderConfig | None = None
    """What grades its answers."""
    teacher: str | None = None
    """Name of the one of [[teachers]] that scores it. None: what its lines say."""
    responses: str | None = field(default=None, metadata=PATH)
    """What the teacher answers to its prompts, for guidance; guidance.responses is left out."""
    max_new_tokens: Count | None = None
    """Longest response; at most rollout.max_new_tokens."""
    mode: str | None = None
    """How a prompt becomes a sequence."""
    apply_chat_template: bool | None = None
    """Whether prompts are wrapped in the tokenizer's chat template."""
    system_prompt: str | None = None
    """First message of a conversation without one of its own."""
    prompt_template: str | None = None
    """Jinja text that makes the prompt of a line's fields."""

    def _check_together(self) -> None:
        _require(
            _is_name(self.name),
            f"tasks.name must have letters, digits, - and _ alone, found {self.name!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig(Settings, section="environment"):
    """Whom the student talks to in episodes of several turns (docs/environments.md)."""

    name: str = ""
    """"package.module:Class" with reset(prompt) and step(text). Empty: there is none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""
    turns: Count = 8
    """Most turns of the student in an episode."""
    turn_tokens: Count | None = None
    """Longest turn. None: what is left of the episode, which has rollout.max_new_tokens, texts of
    the environment included."""
    stop_token_ids: tuple[Number, ...] = ()
    """Further ids that end a turn, and are part of its text."""
    timeout_seconds: Positive = 10.0
    """An environment that says nothing for so long has failed, and its episode is over."""
    workers: Count = 4
    """Environments of a rank that are asked at once; each has a process of its own."""
    continuous: bool = False
    """Whether episodes go on each at its own pace, so that engines stay full, in place of rounds in
    which each has one turn. Samples then depend on time in their last bits (colocated engines)."""
    max_failures: Share = 0.5
    """Largest share of a step's episodes whose environment fails; above it the run stops. 1: it
    goes on."""

    def _check_together(self) -> None:
        module, _, name = self.name.partition(":")
        _require(
            bool(module and name) or not self.name,
            f'environment.name must name a class as "package.module:Class", found {self.name!r}.',
        )
        require_plain(self.settings, "environment.settings")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Settings, section="teacher"):
    """Where the teacher's signals come from."""

    placement: str = "resident"
    """resident: a model on the student's ranks; cached: no model, but what ``tropd score`` wrote
    into teacher.cache; served: no model, but `vllm serve` at teacher.address; self: the student's
    own weights; separate: a model on ranks of its own (docs/teachers.md).
    "package.module:attribute": a source of your own (docs/extending.md)."""
    cache: str | None = field(default=None, metadata=PATH)
    """cached: the folder of the scored rollouts; ``tropd score`` makes it."""
    cache_top_k: Count | None = None
    """The teacher's most likely ids that ``tropd score`` keeps of each token. None: 64, or as many
    as the loss needs if these are more."""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which ``tropd score`` keeps their log-probs (docs/teachers.md has the error)."""
    reference: str | None = field(default=None, metadata=PATH | {"words": (STUDENT,)})
    """Folder of a second frozen model, which the teacher is measured against by the losses that
    need one (docs/losses.md); same tokenizer. "student": what the student starts from. None: no
    such model."""
    offload: Literal["none", "host", "host_by_layer"] = "none"
    """Where the resident teacher's layers (and its reference's) are while they do not score. none:
    on the GPU. host: page-locked in the host's memory; all visit the GPU to score a step.
    host_by_layer: the same, but they visit one after the other for each micro-batch, two at a time
    (docs/planning.md says when). No number changes. Of a cached teacher: while ``tropd score``
    runs."""

    context: str | None = None
    """What the teacher reads in the place of the prompt: a text with fields of the prompt's line in
    braces, such as "{prompt} {solution}". None: the prompt."""
    ema_decay: Annotated[float, Range(0, 1, "[)")] | None = None
    """self: after each step the teacher is ema_decay times itself plus the rest of the student.
    None: it stays what the student starts from."""

    parallel: ModelParallelConfig | None = None
    """[teacher.parallel]: a layout of the resident teacher's own (and of its reference) on the same
    ranks (docs/teachers.md). None: the student's. separate: its layout on its own ranks. None: a
    whole copy on each of them."""
    ranks: Count | None = None
    """separate: ranks of the teacher, which the job has beside the student's [parallel]."""

    address: tuple[str, ...] = ()
    """served: addresses of `vllm serve` with the teacher, "http://host:port" each; several are
    replicas that share the work. cached: where ``tropd score`` asks, in place of loading it."""
    served_model: str | None = None
    """served: the name of the teacher there. None: a name or path that ends like model.teacher."""
    requests: Count = 32
    """served: sequences under way at each address, over all ranks."""
    timeout_seconds: Positive = 300.0
    """served: a request without an answer for so long is made again, perhaps elsewhere."""

    def _check_together(self) -> None:
        wrong = [one for one in self.address if not one.startswith(("http://", "https://"))]
        _require(
            not wrong,
            f'teacher.address must hold addresses like "http://host:8000", found {wrong}.',
        )


@dataclass(frozen=True, kw_only=True)
class NamedTeacher(TeacherConfig, section="teachers"):
    """One of several teachers, [[teachers]]: what [teacher] says of a single one, and whose prompts
    it scores (docs/teachers.md). Resident ones are in the host's memory while they do not score.
    """

    name: str
    """Letters, digits, - and _: what "teacher" in a line of the prompts says, and metrics."""
    model: str = field(metadata=PATH)
    """Its folder; model.teacher is left out."""
    sources: tuple[str, ...] = ()
    """It scores the prompts whose lines have one of these as "source", and no "teacher"."""
    responses: str | None = field(default=None, metadata=PATH)
    """What it answers to its prompts, for guidance; guidance.responses is left out."""

    def _check_together(self) -> None:
        super()._check_together()
        _require(
            _is_name(self.name),
            f"teachers.name must have letters, digits, - and _ alone, found {self.name!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings, section="run"):
    """The run's folder and what is kept in it."""

    dir: str
    """Folder of the run, made if absent; the same command in the same folder resumes."""
    checkpoint_every: Number = 50
    """Steps between checkpoints; the last step is always kept; 0: only the last."""
    keep_checkpoints: Count = 2
    """Newest complete checkpoints kept."""
    checkpoint_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """Form of the distributed optimizer's state in the checkpoints of checkpoint_every; Megatron's
    names. fully_reshardable: resumes under any layout; a save gathers 12 bytes a parameter on each
    replica. dp_reshardable: nothing is gathered; resumes under any parallel.data and context, the
    other axes as they were. The last checkpoint, and one that a signal asks for, is
    fully_reshardable."""
    timeout_minutes: Positive = 30.0
    """Longest a phase of a step may last, rollout and evaluation included, before the run is taken
    to hang and ends (exit code 75)."""
    deterministic: bool = False
    """Whether the same run again is to give the same bits on GPUs, too, for some speed (on a CPU it
    does anyway). What cannot is refused by name (docs/reliability.md)."""
    trajectories_every: Number = 25
    """Steps between dumps of example trajectories with per-token values; 0: none."""
    num_trajectories: Number = 8
    """Trajectories of one dump."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""

    def _check_together(self) -> None:
        _require(bool(self.dir), "run.dir must name a folder, found an empty string.")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """One distillation run."""

    model: ModelConfig
    rollout: RolloutConfig
    train: TrainConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: tuple[NamedTeacher, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    guidance: GuidanceConfig = GuidanceConfig()
    loss: LossSettings = field(default_factory=lambda: preset("tropd"))
    evaluation: EvaluationConfig = EvaluationConfig()
    grader: GraderConfig = GraderConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    def _check_together(self) -> None:
        _require(
            bool(self.model.teacher) or bool(self.teachers) or self.teacher.placement == SELF,
            "Config key model.teacher is missing and has no default. Name the teacher's folder, or "
            "several in [[teachers]].",
        )
        self._check_tasks()
        world, engines = self.parallel.world_size, self.rollout.num_engines
        _require(
            self.rollout.placement == "separate" or world % engines == 0,
            f"rollout.num_engines must divide the world size {world} (tensor x context x pipeline "
            f"x data), found {engines}.",
        )
        _require(
            self.guidance.prefixed_per_prompt <= self.rollout.samples_per_prompt,
            f"guidance.prefixed_per_prompt = {self.guidance.prefixed_per_prompt} exceeds "
            f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}.",
        )
        exact_probabilities = (
            self.rollout.temperature == 1
            and self.rollout.top_p == 1
            and self.rollout.behaviour != "cooled"
        )
        _require(
            not self.loss.needs.rollout_logprobs or exact_probabilities,
            "loss.importance needs rollout.temperature = 1 and rollout.top_p = 1, also in the "
            f"warm-up, found {self.rollout.temperature} and {self.rollout.top_p} with "
            f'rollout.behaviour = "{self.rollout.behaviour}": the engine reports probabilities '
            "at temperature 1 over the whole vocabulary. Change one.",
        )
        _require(
            self.run.checkpoint_sharding == "fully_reshardable"
            or self.parallel.distributed_optimizer,
            'run.checkpoint_sharding = "dp_reshardable" is a form of the distributed optimizer\'s '
            "state, found parallel.distributed_optimizer = false. Remove one of the two.",
        )
        if self.run.deterministic:
            deterministic.check_options("model", self.megatron.model)
            deterministic.check_options("teacher", self.megatron.teacher)
        check_part(_MODES, self.rollout.mode, setting="rollout.mode")
        self._check_environment()
        self._check_cp_comm_type()
        if self.teachers:
            self._check_teachers()
        else:
            check_part(_SOURCES, self.teacher.placement, setting="teacher.placement")
            self._check_reference()
            self._check_offload()
            self._check_teacher_layout()
            self._check_separate()
            self._check_cached()
            self._check_served()
            self._check_self()
            self._check_context()
        self._check_golden()
        self._check_recorded()
        self._check_samples()

    def _check_tasks(self) -> None:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        _require(not twice, f"tasks.name: {', '.join(twice)} is there twice. Change one.")
        asked = [each.of_task for each in self.evaluation.sets if each.of_task is not None]
        unknown = [name for name in asked if name not in names]
        _require(
            not unknown,
            f"evaluation.sets.of_task = {unknown[:1]}: expected one of the tasks {names}. Correct "
            "the name, or add it to [[tasks]].",
        )
        _require(
            bool(self.tasks) != bool(self.rollout.prompts),
            "[[tasks]] is beside rollout.prompts, which is for a single one. Move it into each "
            "[[tasks]]."
            if self.tasks
            else "Config key rollout.prompts is missing and has no default. Name the file of the "
            "prompts, or several in [[tasks]].",
        )
        if self.tasks:
            self._check_for_one_task()
        for task in self.tasks:
            self._check_task(task)

    def _check_task(self, task: TaskConfig) -> None:
        longest, teachers = self.rollout.max_new_tokens, [each.name for each in self.teachers]
        _require(
            (task.max_new_tokens or 1) <= longest,
            f"tasks.max_new_tokens = {task.max_new_tokens} of {task.name} must be at most "
            f"rollout.max_new_tokens = {longest}. Raise that.",
        )
        _require(
            task.teacher is None or not self.tasks or task.teacher in teachers,
            f"tasks.teacher = {task.teacher!r} of {task.name}: expected one of the [[teachers]] "
            f"{teachers}. Correct the name, or leave it out.",
        )
        mode = self.rollout_of(task).mode
        check_part(_MODES, mode, setting="tasks.mode")
        _require(
            mode != MULTI_TURN or self.rollout.mode == MULTI_TURN,
            f'tasks.mode = "{MULTI_TURN}" of {task.name} needs rollout.mode = "{MULTI_TURN}" and '
            f'[environment], found rollout.mode = "{self.rollout.mode}". Set them.',
        )

    def _check_for_one_task(self) -> None:
        """Refuse with several tasks what knows of one file of prompts alone."""
        single = {
            "rollout.data": self.rollout.data != DataConfig(),
            "rollout.recorded": self.rollout.recorded is not None,
            "guidance.responses": self.guidance.responses is not None,
            "teachers.responses": any(teacher.responses for teacher in self.teachers),
            'teacher.placement = "cached"': self.teacher.placement == "cached",
        }
        found = [key for key, is_set in single.items() if is_set]
        _require(
            not found,
            f"[[tasks]] is beside {', '.join(found)}, which is for a single file of prompts. Leave "
            "one of the two out (a task has data and responses of its own).",
        )

    def rollout_of(self, task: TaskConfig) -> RolloutConfig:
        """Return how a task is sampled: [rollout] with what the task says in its place."""
        shared = {f.name for f in fields(RolloutConfig)} & {f.name for f in fields(TaskConfig)}
        given = {n: v for n in shared if (v := getattr(task, n)) is not None}
        rollout, longest = self.rollout, task.max_new_tokens
        first = rollout.first_new_tokens
        if first is not None and longest is not None:
            given["first_new_tokens"] = min(first, longest)
        return dataclasses.replace(rollout, **given)

    @property
    def rollouts(self) -> tuple[RolloutConfig, ...]:
        """How each task is sampled, by its number; of a run without tasks that of its prompts."""
        return tuple(map(self.rollout_of, self.tasks)) or (self.rollout,)

    @property
    def graders(self) -> tuple[GraderConfig, ...]:
        """What grades each task, by its number; of a run without tasks what grades its prompts."""
        return tuple(task.grader or self.grader for task in self.tasks) or (self.grader,)

    @property
    def talks_to(self) -> EnvironmentConfig | None:
        """Whom the student talks to; None: nobody."""
        return self.environment if self.environment.name else None

    def _check_environment(self) -> None:
        asked = self.rollout.mode == MULTI_TURN
        _require(
            asked == (self.talks_to is not None) or ":" in self.rollout.mode,
            f'rollout.mode = "{MULTI_TURN}" and environment.name go together, found '
            f"rollout.mode = {json.dumps(self.rollout.mode)} and environment.name = "
            f"{json.dumps(self.environment.name)}. Set both or neither.",
        )
        _require(
            not asked or self.rollout.steps_ahead == 0,
            f'rollout.mode = "{MULTI_TURN}" needs rollout.steps_ahead = 0, found 1: all turns of '
            "an episode are sampled with the same weights.",
        )
        _require(
            not asked or all(one.teacher.context is None for one in self.by_teacher.values()),
            f'teacher.context does not go with rollout.mode = "{MULTI_TURN}": it replaces '
            "the prompt, which reset() of the environment may change. Leave out one of the two.",
        )
        alike = all(rollout.mode == MULTI_TURN for rollout in self.rollouts)
        _require(
            not self.environment.continuous or alike,
            f'environment.continuous = true needs mode = "{MULTI_TURN}" of every task, found '
            "another. Leave it out.",
        )
        fixed = self.run.deterministic or self.rollout.placement != "colocated"
        _require(
            not self.environment.continuous or not fixed,
            "environment.continuous = true needs colocated engines and run.deterministic = false, "
            f'found rollout.placement = "{self.rollout.placement}" and run.deterministic = '
            f"{json.dumps(self.run.deterministic)}: samples depend on time. Change one of them.",
        )
        _require(
            not asked or self.evaluation.task == "exact_match" or not self.evaluation.measures,
            f'evaluation.task = "{self.evaluation.task}" samples one turn, found rollout.mode = '
            f'"{MULTI_TURN}". Set evaluation.task = "exact_match", or leave out the problems.',
        )

    def _check_samples(self) -> None:
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        _require(
            samples % self.parallel.data == 0,
            f"rollout.prompts_per_step x samples_per_prompt = {samples} must be divisible by "
            f"parallel.data = {self.parallel.data}: every replica trains on equally many "
            "trajectories. Change one of the three.",
        )
        rows, multiple = samples // self.parallel.data, self.parallel.batch_multiple
        _require(
            rows % multiple == 0,
            f"parallel.virtual_pipeline = {self.parallel.virtual_pipeline} sends micro-batches "
            f"through the chunks in groups of parallel.pipeline = {multiple}: expected a multiple "
            f"of {multiple} trajectories for each replica, found rollout.prompts_per_step x "
            f"samples_per_prompt / parallel.data = {rows}. Change one of them, or set "
            "virtual_pipeline = 1.",
        )

    def _check_teachers(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        sources = [source for teacher in self.teachers for source in teacher.sources]
        for key, values in (("name", names), ("sources", sources)):
            twice = sorted({value for value in values if values.count(value) > 1})
            _require(not twice, f"teachers.{key}: {', '.join(twice)} is there twice. Change one.")
        single = {
            "model.teacher": bool(self.model.teacher),
            "[teacher]": self.teacher != TeacherConfig(),
            "guidance.responses": self.guidance.responses is not None,
        }
        found = [key for key, is_set in single.items() if is_set]
        _require(
            not found,
            f"[[teachers]] is beside {', '.join(found)}, which is for a single teacher. Move it "
            "into each [[teachers]], or leave it out.",
        )
        without = [teacher.name for teacher in self.teachers if teacher.responses is None]
        _require(
            not without or len(without) == len(names),
            f"teachers.responses must be there for every teacher or for none, found none for "
            f"{', '.join(without)}.",
        )
        averaged = [teacher.name for teacher in self.teachers if teacher.ema_decay is not None]
        _require(
            len(averaged) < 2,
            f"teachers.ema_decay: a run keeps one average of its student, found {len(averaged)} "
            f"({', '.join(averaged)}). Leave it out of all but one.",
        )
        self._check_for_one_teacher()
        for named in self.teachers:
            try:
                self._alone(named)  # is checked when it is made
            except ConfigError as error:
                raise ConfigError(f"[[teachers]] {named.name}: {error}") from None

    def _check_for_one_teacher(self) -> None:
        """Refuse with several teachers what knows of one alone."""
        graded = self.evaluation.measures
        one_only = {
            f'rollout.behaviour = "{self.rollout.behaviour}"': self.rollout.asks_teacher,
            "[teachers.parallel]": any(teacher.parallel for teacher in self.teachers),
            f'teachers.placement = "{SEPARATE}"': any(teacher.ranks for teacher in self.teachers),
            'evaluation.task = "reverse_kl"': graded and self.evaluation.task == "reverse_kl",
            'evaluation.teacher = true with rollout.placement = "separate"': graded
            and self.evaluation.teacher
            and self.rollout.placement == "separate",
        }
        named = [what for what, is_set in one_only.items() if is_set]
        _require(
            not named,
            f"{', '.join(named)} takes one teacher, found [[teachers]]. Change one of the two.",
        )

    def _check_cp_comm_type(self) -> None:
        """Refuse a way of keys and values that leads nowhere."""
        for table, options in self.megatron.tables():
            layout = self.teacher_parallel if table == "teacher" else self.parallel
            _require(
                layout.context > 1 or "cp_comm_type" not in options,
                f"megatron.{table}.cp_comm_type does nothing without context parallelism, found "
                f"{layout.key('context')} = 1. Raise that, or remove this one.",
            )

    def _check_recorded(self) -> None:
        name, recorded = self.loss.method_name(), self.rollout.recorded
        _require(
            recorded is not None or not self.loss.needs.outcomes,
            f"loss.method = {name!r} fits the outcomes of recorded rollouts and needs "
            "rollout.recorded, found none. Record some with `tropd rollouts` and name the file.",
        )
        ignored = {
            f"guidance.{name}": getattr(self.guidance, name) is not None
            for name in ("responses", "golden_field")
        } | {
            f"rollout.{name}": getattr(self.rollout, name) != getattr(RolloutConfig, name)
            for name in ("mode", "behaviour", "first_new_tokens")
        }
        named = [key for key, is_set in ignored.items() if is_set]
        _require(
            recorded is None or not named,
            f"rollout.recorded takes sequences as they are and does not read {', '.join(named)}. "
            "Leave one of the two out.",
        )

    def _check_reference(self) -> None:
        name, given = self.loss.method_name(), self.teacher.reference
        _require(
            given is not None or not self.loss.needs.reference or ":" in self.teacher.placement,
            f"loss.method = {name!r} compares with a reference model and needs teacher.reference, "
            'found none. Name "student", what the student starts from (stable_opd means it), or '
            "the folder of what the teacher was trained from.",
        )
        _require(
            given is None or self.loss.needs.reference,
            f"teacher.reference = {given!r} would be loaded for nothing: loss.method = {name!r} "
            "does not read it. Leave it out, or choose a loss that does (exopd, delta, erpd, "
            "stable_opd).",
        )

    def _check_golden(self) -> None:
        name, field = self.loss.method_name(), self.guidance.golden_field
        _require(
            field is not None or not self.loss.needs.golden,
            f"loss.method = {name!r} reads golden answers and needs guidance.golden_field, found "
            "none. Name the field of a prompt's line that holds its answer, or set "
            "loss.golden_weight = 0.",
        )
        _require(
            field is None or self.loss.needs.golden,
            f"guidance.golden_field = {field!r} would be read for nothing: loss.method = {name!r} "
            "has no loss for golden answers. Leave it out, or choose one that has (stable_opd).",
        )
        samples, mode = self.rollout.samples_per_prompt, self.rollout.mode
        prefixed = self.guidance.prefixed_per_prompt if self.guidance.responses else 0
        _require(
            field is None or samples > max(prefixed, 1),
            "guidance.golden_field takes one of rollout.samples_per_prompt, and "
            f"{max(prefixed, 1)} more must be left (a sample, guidance.prefixed_per_prompt), found "
            f"{samples}. Raise it.",
        )
        _require(
            field is None or mode == RolloutConfig.mode,
            f'guidance.golden_field needs rollout.mode = "{RolloutConfig.mode}", found "{mode}". '
            "Leave one of the two out.",
        )

    def _check_cached(self) -> None:
        if self.teacher.placement != "cached":
            return
        named = {"teacher.cache": self.teacher.cache, "rollout.recorded": self.rollout.recorded}
        for name, value in named.items():
            _require(
                value is not None,
                f'teacher.placement = "cached" reads the scores of recorded rollouts and needs '
                f"{name}, found none. Record with `tropd rollouts`, then run `tropd score`.",
            )
        self._check_without_teacher()
        kept, read = self.cached_top_k, self.loss.needs.top_k
        _require(
            kept >= read,
            f"teacher.cache_top_k must be at least {read}, the ids that the loss reads of each "
            f"token, found {kept}. Raise it, or leave it out, before `tropd score` runs.",
        )

    def _check_self(self) -> None:
        is_self, named = self.teacher.placement == SELF, self.model.teacher
        _require(
            not is_self or named in ("", self.model.student),
            f'teacher.placement = "{SELF}" is the student itself, found model.teacher = {named!r}. '
            "Leave it out.",
        )
        _require(
            is_self or self.teacher.ema_decay is None,
            f'teacher.ema_decay is for teacher.placement = "{SELF}", found '
            f'"{self.teacher.placement}". Remove it.',
        )

    def _check_context(self) -> None:
        graded = self.evaluation.measures
        blind = {
            f'rollout.behaviour = "{self.rollout.behaviour}"': self.rollout.asks_teacher,
            'evaluation.task = "reverse_kl"': graded and self.evaluation.task == "reverse_kl",
        }
        named = [what for what, is_set in blind.items() if is_set]
        _require(
            self.teacher.context is None or not named,
            f"{', '.join(named)} shows the teacher the student's prompt, and teacher.context would "
            "not be read there. Change one of the two.",
        )

    @property
    def by_teacher(self) -> dict[str, "Config"]:
        """The run with each of its teachers alone, by what messages call the teacher.

        model.teacher is a folder there: the student's, if the teacher is the student itself.
        """
        if not self.teachers:
            is_self = self.teacher.placement == SELF
            folder = self.model.student if is_self else self.model.teacher
            model = dataclasses.replace(self.model, teacher=folder)
            return {TEACHER: dataclasses.replace(self, model=model) if is_self else self}
        return {f"{TEACHER} {named.name}": self._alone(named) for named in self.teachers}

    def _alone(self, named: NamedTeacher) -> "Config":
        settings = {f.name: getattr(named, f.name) for f in fields(TeacherConfig)}
        resident = [t for t in self.teachers if t.placement == TeacherConfig.placement]
        if named in resident and len(resident) > 1 and named.offload == "none":
            settings["offload"] = "host"  # one of them on the device at a time
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, teacher=named.model),
            teacher=TeacherConfig(**settings),
            guidance=dataclasses.replace(self.guidance, responses=named.responses),
            teachers=(),
            tasks=tuple(dataclasses.replace(task, teacher=None) for task in self.tasks),
        )

    def _check_without_teacher(self) -> None:
        placement = self.teacher.placement
        graded = self.evaluation.task == "exact_match" and not self.evaluation.teacher
        _require(
            not self.evaluation.measures or graded,
            f'teacher.placement = "{placement}" loads no teacher, found an evaluation that needs '
            'one. Set evaluation.teacher = false and evaluation.task = "exact_match".',
        )

    def _check_served(self) -> None:
        placement, addresses = self.teacher.placement, self.teacher.address
        asks = placement == "served" or (placement == "cached" and bool(addresses))
        _require(
            asks == bool(addresses),
            f'teacher.placement = "{placement}" and teacher.address = {list(addresses)} do not go '
            'together: "served" needs addresses of `vllm serve`, "cached" may have some, others '
            "have none.",
        )
        unread = [
            f"teacher.{name}"
            for name in ("served_model", "requests", "timeout_seconds")
            if getattr(self.teacher, name) != getattr(TeacherConfig, name)
        ]
        # Of a cached teacher `tropd score` may read them, which loads one if it has no address.
        loaded = placement in (TeacherConfig.placement, SELF) and self.teacher.cache is None
        _require(
            not unread or not loaded,
            f'teacher.placement = "{placement}" asks no server and does not read '
            f"{', '.join(unread)}. Leave it out.",
        )
        if placement != "served":
            return
        self._check_without_teacher()
        _require(
            not self.rollout.asks_teacher,
            f'rollout.behaviour = "{self.rollout.behaviour}" samples with a teacher that is '
            'loaded, found teacher.placement = "served". Change one of the two.',
        )

    @property
    def loads_teacher(self) -> bool:
        """Whether the run has a model of a teacher (or a source of the user's own has)."""
        if self.teachers:
            return any(alone.loads_teacher for alone in self.by_teacher.values())
        return self.teacher.placement not in ("cached", "served")

    @property
    def signal_top_k(self) -> int:
        """Ids of each token that a teacher says which is not loaded."""
        for_files = self.teacher.cache is not None  # `tropd score` asks a server
        if self.teacher.placement == "served" and not for_files:
            return max(1, self.loss.needs.top_k)
        return self.cached_top_k

    @property
    def cached_top_k(self) -> int:
        """Ids of each token that ``tropd score`` keeps."""
        return self.teacher.cache_top_k or max(CACHED_TOP_K, self.loss.needs.top_k)

    def _check_offload(self) -> None:
        where = f"teacher.offload = {self.teacher.offload!r}"
        is_set, source = self.teacher.offload != "none", self.teacher.placement
        loading = (TeacherConfig.placement, SEPARATE, "cached")
        copied = source == SELF and self.teacher.ema_decay is None and self.model.lora is None
        _require(
            not is_set or source in loading or ":" in source or copied,
            f"{where} is for a model that the job loads, found teacher.placement = "
            f'"{source}". Remove one of the two.',
        )
        scaled = [name for name in ("fp8", "fp4") if self.megatron.teacher.get(name)]
        _require(
            not is_set or not scaled,
            f"{where} beside megatron.teacher.{''.join(scaled[:1])}: Transformer Engine keeps "
            "copies of the weights in that type on the GPU, so it would gain little. Remove one of "
            "the two.",
        )

    def _check_teacher_layout(self) -> None:
        own, source = self.teacher.parallel, self.teacher.placement
        if own is None:
            return
        _require(
            source in (TeacherConfig.placement, SEPARATE) or ":" in source,
            "[teacher.parallel] lays out a model on the ranks of the job, found teacher.placement "
            f'= "{source}", which has none there. Remove one of the two.',
        )
        _require(
            self.teacher.context is None,
            "teacher.context is read in the student's layout, found [teacher.parallel] beside it. "
            "Remove one of the two.",
        )
        _ = self.teacher_parallel

    def _check_separate(self) -> None:
        is_separate, ranks = self.teacher.placement == SEPARATE, self.teacher.ranks
        _require(
            is_separate == (ranks is not None),
            f'teacher.placement = "{self.teacher.placement}" and teacher.ranks = {ranks} do not go '
            f'together: "{SEPARATE}" needs the number of ranks that the teacher gets beside the '
            f"student's {self.parallel.world_size} ([parallel]), others have none.",
        )
        if not is_separate:
            return
        _require(
            self.teacher.context is None,
            "teacher.context is read on the student's ranks, found teacher.placement = "
            f'"{SEPARATE}". Set "{TeacherConfig.placement}", or leave teacher.context out.',
        )
        _ = self.teacher_parallel

    @property
    def teacher_parallel(self) -> ParallelConfig:
        """Layout of the teacher and its reference: their own, or the student's."""
        own, ranks = self.teacher.parallel, self.teacher.ranks
        if ranks is not None:
            return (own or ModelParallelConfig()).over(ranks, "of the teacher (teacher.ranks)")
        return self.parallel if own is None else own.over(self.parallel.world_size)

    @property
    def world_size(self) -> int:
        """Ranks (processes) of the job: the student's, then those of a separate teacher."""
        return self.parallel.world_size + (self.teacher.ranks or 0)

    @property
    def ranks_in_words(self) -> str:
        """What the ranks of the job are, for messages."""
        student, own = "parallel: tensor x context x pipeline x data", self.teacher.ranks
        if own is None:
            return student
        return f"{student} = {self.parallel.world_size}, and teacher.ranks = {own}"

    def teaches(self, rank: int) -> bool:
        """Whether a rank of the job is one of a separate teacher's."""
        return rank >= self.parallel.world_size

    @property
    def scores_here(self) -> bool:
        """Whether a teacher's pass is work of the student's ranks."""
        return self.loads_teacher and self.teacher.ranks is None

    def parallel_of(self, who: str) -> ParallelConfig:
        """Layout of one of the run's models: "student", "teacher" or "reference"."""
        return self.parallel if who == "student" else self.teacher_parallel

    @property
    def reference(self) -> str | None:
        """Folder of the model that the teacher is measured against."""
        named = self.teacher.reference
        return self.model.student if named == STUDENT else named

    @property
    def pad_multiple(self) -> int:
        """What the padded length of a row is a multiple of, so that the models can compute it."""
        return self.parallel.row_shards * self.megatron.token_multiple

    @property
    def evaluation_sets(self) -> tuple[EvaluationSet, ...]:
        """The sets of held-out problems, each with all that it leaves to other sections.

        The one set of ``evaluation.problems`` has no name.
        """
        evaluation, sets = self.evaluation, self.evaluation.sets
        if evaluation.problems is not None:
            sets = (EvaluationSet(name="", problems=evaluation.problems, data=evaluation.data),)
        return tuple(map(self._completed, sets))

    def _completed(self, each: EvaluationSet) -> EvaluationSet:
        """The set with all that it leaves to its task and to other sections."""
        evaluation, task = self.evaluation, self.task_of(each)
        rollout = self.rollout if task is None else self.rollout_of(task)
        shared: dict[str, Any] = {
            "num_problems": evaluation.num_problems,
            "samples": evaluation.samples,
            "temperature": evaluation.temperature,
            "top_p": evaluation.top_p,
            "max_new_tokens": evaluation.max_new_tokens or rollout.max_new_tokens,
            "grader": (task and task.grader) or self.grader,
        }
        if task is not None:
            form = ("apply_chat_template", "system_prompt", "prompt_template")
            shared |= {name: getattr(rollout, name) for name in form}
        missing = {name: v for name, v in shared.items() if getattr(each, name) is None}
        return dataclasses.replace(each, **missing)

    def task_of(self, each: EvaluationSet) -> TaskConfig | None:
        """Return the task that a set measures, if it names one."""
        return next((task for task in self.tasks if task.name == each.of_task), None)


def reference_of(teacher: str) -> str:
    """What messages call the reference of a teacher (a key of ``Config.by_teacher``)."""
    return teacher.replace(TEACHER, "reference", 1)


def read_tables(path: str | Path) -> dict[str, Any]:
    """Read the tables of a TOML file, input paths made absolute; nothing else is checked."""
    path = Path(path)
    tables = read_toml(path, "Config file")
    _anchor_paths(tables, path.resolve().parent)
    return tables


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, check everything.

    Args:
        path: the TOML file. Relative input paths in it are taken from its folder.
        overrides: ``section.key=value``; value in TOML syntax, bare words are strings.

    Returns:
        The checked config, input paths made absolute; ``~`` means home in every path.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown or missing, a value has the
            wrong type or does not fit.
    """
    tables = read_tables(path)
    for override in overrides:
        apply_override(tables, override)
    refuse_old_form(tables.get("loss"))
    config: Config = _build(Config, tables, "")
    run = dataclasses.replace(config.run, dir=os.path.expanduser(config.run.dir))
    return dataclasses.replace(config, run=run)


def load_evaluation(path: str | Path) -> tuple[EvaluationConfig, GraderConfig]:
    """Read a TOML file that says nothing but what is measured: [evaluation], perhaps [grader].

    Raises:
        ConfigError: as :func:`load_config`.
    """
    tables = read_toml(Path(path), "File of evaluation sets")
    sections = {"evaluation": EvaluationConfig, "grader": GraderConfig}
    others = [name for name in tables if name not in sections]
    _require(
        not others,
        f"{path}: expected [evaluation], [[evaluation.sets]] and [grader] alone, found "
        f"{', '.join(others)}. Leave it out, or give --like RUN.",
    )
    _anchor_paths(tables, Path(path).resolve().parent)
    evaluation, grader = (
        _build(section, tables.get(name, {}), name) for name, section in sections.items()
    )
    _require(evaluation.measures, f"{path} names no held-out problems: add [[evaluation.sets]].")
    return evaluation, grader


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary of every setting, JSON-ready."""
    tables = dataclasses.asdict(config)
    for several in _SEVERAL:
        if not tables[several]:
            del tables[several]
    tables["loss"] = {"method": config.loss.method_name(), **tables["loss"]}
    plain: dict[str, Any] = json.loads(json.dumps(tables))
    return plain


def default_settings() -> dict[str, dict[str, Any]]:
    """Every setting that has a default, as :func:`config_to_dict` would have it."""
    return {
        name: {
            f.name: json.loads(json.dumps(_default(f)))
            for f in fields(section)
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        for name, section in _sections().items()
    }


def _default(f: "dataclasses.Field[Any]") -> Any:
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return vars(value) if isinstance(value, Settings) else value


def config_to_toml(config: Config) -> str:
    """Every setting as a TOML file that :func:`load_config` reads from anywhere.

    Input paths are absolute, as in any loaded config; so must ``run.dir`` be.
    """
    lines = []
    for section, found in config_to_dict(config).items():
        several = isinstance(found, list)
        for table in found if several else [found]:
            lines.append(f"\n[[{section}]]" if several else f"\n[{section}]")
            lines += [f"{k} = {_toml(value)}" for k, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        # TOML has no null: it leaves out what is None by default.
        given = {key: item for key, item in value.items() if item is not None}
        entries = (f"{json.dumps(key)} = {_toml(item)}" for key, item in given.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # DEL is the one character that JSON takes as it is and TOML does not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def config_from_dict(tables: dict[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict` (resolved JSON of a run folder)."""
    config: Config = _build(Config, tables, "")
    return config


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """The tables in config.json of a run folder, whatever version wrote them.

    Raises:
        ConfigError: the file cannot be read, or is no run's.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read as the settings of a run ({error}). Put it back, or give "
            "another folder."
        ) from None
    if not is_run_settings(found):
        raise ConfigError(
            f"{path} holds no settings of a run, but another program's. Give another folder."
        )
    teacher = found.get("teacher", {})
    if "source" in teacher:  # before there were placements
        teacher["placement"] = teacher.pop("source")
    loss = found.get("loss")
    if loss and "method" not in loss:  # version 0.1
        loss = new_form(loss)
    if loss:
        found["loss"] = json.loads(json.dumps(loss_defaults(loss["method"]))) | loss
    tables: dict[str, dict[str, Any]] = found
    return tables


def is_run_settings(value: Any) -> bool:
    """Whether the content of a config.json is a run's, and no model's."""
    if not (isinstance(value, dict) and {"model", "rollout", "run"} <= value.keys()):
        return False
    several = [value.get(name, []) for name in _SEVERAL]
    sections = [section for name, section in value.items() if name not in _SEVERAL]
    if not all(isinstance(tables, list) for tables in several):
        return False
    return all(isinstance(s, dict) for s in [*sections, *chain.from_iterable(several)])


def settings_from_table(cls: Any, table: dict[str, Any], section: str = "") -> Any:
    """An instance of a dataclass of settings, checked as strictly as a config.

    Args:
        cls: the dataclass.
        table: its fields.
        section: how messages call the table.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or does not fit.
    """
    return _build(cls, table, section)


def _sections() -> dict[str, Any]:
    """Tables of a config, but [[teachers]] and [[tasks]], of which there are several."""
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name not in _SEVERAL}


def _anchor_paths(tables: dict[str, Any], folder: Path) -> None:
    for name, section in _sections().items():
        _anchor(tables.get(name), section, folder)
    evaluation = tables.get("evaluation")
    several = {
        NamedTeacher: tables.get("teachers"),
        TaskConfig: tables.get("tasks"),
        EvaluationSet: evaluation.get("sets") if isinstance(evaluation, dict) else None,
    }
    for section, found in several.items():
        for table in found if isinstance(found, list) else ():
            _anchor(table, section, folder)


def _anchor(table: Any, section: Any, folder: Path) -> None:
    if not isinstance(table, dict):
        return
    for f in fields(section):
        value = table.get(f.name)
        if isinstance(value, str) and _is_path(f, value):
            table[f.name] = str(folder / Path(value).expanduser())


def _is_path(f: "dataclasses.Field[Any]", value: str) -> bool:
    """Whether a value of this field names an input file or folder."""
    named = value in f.metadata.get("words", ()) or value.startswith(HUB_MODEL)
    return bool(f.metadata.get("path") and value) and not named


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Write ``section.key=value`` into tables; raises ConfigError if it has another form."""
    key, equals, text = override.partition("=")
    section_name, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise ConfigError(f"Override {override!r} must look like section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    section = _sections().get(section_name)
    known = () if section is None else fields(section)
    if isinstance(value, str) and any(f.name == name and _is_path(f, value) for f in known):
        value = str(Path(value).expanduser().resolve())
    *within, last = (section_name, *name.split("."))
    table = tables
    for depth, key in enumerate(within):
        table = table.setdefault(key, {})
        place = ".".join(within[: depth + 1])
        _require(isinstance(table, dict), f"[{place}] must be a table, found {table!r}.")
    table[last] = value


def _build(cls: Any, table: Any, where: str) -> Any:
    _require(isinstance(table, dict), f"[{where}] must be a table, found {table!r}.")
    if issubclass(cls, Settings):
        cls, table = cls.class_of(table)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    method = f" of loss.method = {cls.method_name()!r}" if issubclass(cls, LossSettings) else ""
    for name, value in table.items():
        _refuse_gone(prefix + name, value)
        if name not in known:
            hint = nearest(name, known).replace("'", prefix, 1).replace("'", "")
            raise ConfigError(
                f"Unknown config key {prefix}{name}{method}.{hint} Known here: {', '.join(known)}."
            )
    values = {}
    for name, f in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"Config key {prefix}{name} is missing and has no default.")
    return cls(**values)


def _refuse_gone(key: str, value: Any) -> None:
    for (old, only), what_now in _GONE.items():
        _require(key != old or only not in (None, value), f"{key} {what_now}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A value of TOML or JSON as Python has it; whether it fits is the dataclass's to say."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and value is not None:
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
