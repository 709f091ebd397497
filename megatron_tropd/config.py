"""Every setting of a run: frozen dataclasses, read from TOML, checked once, written as JSON.

Needs only the standard library, so a config can be checked on a login node without torch.
Paths in a TOML file are relative to the file; paths given as ``key=value`` overrides and
``run.dir`` are relative to the current directory. Unknown keys are errors.
"""

import dataclasses
import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.errors import ConfigError
from megatron_tropd.loss_config import LossConfig

PATH = {"path": True}  # metadata of the fields that name an input file or folder


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pair: two model folders, each an HF folder (config.json, *.safetensors, tokenizer) or a
    Megatron checkpoint made by ``tropd convert``."""

    student: str = field(metadata=PATH)
    """Folder of the student: architecture and first weights."""
    teacher: str = field(metadata=PATH)
    """Folder of the teacher. Frozen. Same tokenizer as the student (checked)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of both models. auto: bfloat16 with CUDA, float32 without."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are laid out. World size = tensor x pipeline x data."""

    tensor: int = 1
    """Tensor-parallel ranks of student and teacher."""
    pipeline: int = 1
    """Pipeline stages of student and teacher."""
    data: int = 1
    """Data-parallel replicas of the student."""
    expert: int = 1
    """Ranks that share the experts of a mixture, taken from the replicas; divides data, or, with
    expert_tensor = 1, tensor x data."""
    expert_tensor: int | None = None
    """Tensor-parallel ranks of each expert: 1 keeps experts whole, so routed tokens are sent once
    and not gathered over the tensor-parallel ranks too. None: tensor."""
    uneven_stages: bool = False
    """Accept layers that pipeline does not divide: the first stages take one more."""
    sequence_parallel: bool = False
    """Shard activations between the tensor-parallel regions along the sequence."""
    distributed_optimizer: bool = False
    """Shard optimizer states over the data-parallel ranks."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data", "expert"):
            value = getattr(self, name)
            _require(value >= 1, f"parallel.{name} must be at least 1, found {value}.")
        _require(
            self.expert_tensor in (None, 1, self.tensor),
            f"parallel.expert_tensor must be 1 or parallel.tensor = {self.tensor}, found "
            f"{self.expert_tensor}.",
        )
        whole = self.shards_of_expert < self.tensor
        sharers = self.tensor * self.data if whole else self.data
        _require(
            sharers % self.expert == 0,
            f"parallel.expert = {self.expert} must divide parallel."
            f"{'tensor x data' if whole else 'data'}, found {sharers}: the replicas share the "
            "experts. Change one of the two.",
        )
        _require(
            self.tensor > 1 or not self.sequence_parallel,
            "parallel.sequence_parallel = true needs parallel.tensor of at least 2, found 1. "
            "Raise parallel.tensor or set sequence_parallel = false.",
        )

    @property
    def world_size(self) -> int:
        """Number of ranks (processes) of the run."""
        return self.tensor * self.pipeline * self.data

    @property
    def shards_of_expert(self) -> int:
        """Tensor-parallel ranks of each expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.tensor * self.data // (self.shards_of_expert * self.expert)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What the student samples at every step, and the engine that samples it."""

    prompts: str = field(metadata=PATH)
    """JSON lines, one object a line: {"prompt": str} or {"messages": [...]}; other keys ignored."""
    max_new_tokens: int
    """Longest response in tokens, a teacher prefix included."""
    prompts_per_step: int = 128
    """Prompts of one optimizer step (global)."""
    samples_per_prompt: int = 4
    """Responses sampled for each prompt, each with a seed of its own."""
    temperature: float = 1.0
    """Sampling temperature. Log-probs in the loss are always at temperature 1."""
    top_p: float = 1.0
    """Nucleus of the sampling distribution; 1 samples the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end a response, beside the tokenizer's EOS."""
    apply_chat_template: bool = False
    """Wrap each prompt in the tokenizer's chat template ("messages" always are)."""
    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: engines share the trainer's devices and sleep while it trains; separate: each is a
    server of its own (``tropd serve``, docs/serving.md)."""
    num_engines: int = 1
    """colocated: engines on the first ranks of equal blocks of the world, which it divides;
    separate: servers."""
    steps_ahead: Literal[0, 1] = 0
    """1: sample for the next step while this one trains, so samples are one step old."""
    weight_transport: Literal["folder", "direct"] = "folder"
    """How a server gets new weights: from the run folder; direct: broadcast to servers that are
    ready (NCCL on CUDA, else gloo), and from the folder for the others (docs/serving.md)."""
    engine_tensor_parallel: int = 1
    """GPUs of one engine. More than 1 needs CUDA."""
    engine_memory: float = 0.4
    """Share of each GPU's memory the engine may take; without CUDA, GiB of KV cache."""

    def __post_init__(self) -> None:
        for name in (
            *("max_new_tokens", "prompts_per_step", "samples_per_prompt"),
            *("num_engines", "engine_tensor_parallel"),
        ):
            value = getattr(self, name)
            _require(value >= 1, f"rollout.{name} must be at least 1, found {value}.")
        _require(
            self.temperature > 0,
            f"rollout.temperature must be above 0, found {self.temperature}: on-policy samples "
            "are drawn at random (evaluation is greedy by itself).",
        )
        _require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], found {self.top_p}.")
        _require(self.engine_memory > 0, "rollout.engine_memory must be above 0.")
        _require(
            self.weight_transport == "folder" or self.placement == "separate",
            'rollout.weight_transport = "direct" needs rollout.placement = "separate", found '
            '"colocated": an engine beside its trainer gets weights through shared memory. Remove '
            "one of the two.",
        )


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Off-policy guidance: some trajectories start with a prefix written by the teacher."""

    responses: str | None = field(default=None, metadata=PATH)
    """JSON lines written by tools/teacher_responses.py. None: no guidance."""
    prefixed_per_prompt: int = 1
    """How many of a prompt's samples carry a teacher prefix."""
    prefix_length: Literal["longest", "uniform"] = "longest"
    """longest: floor(alpha(t) x response length); uniform: a keyed draw between 0 and that."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """alpha(t), the share of the response a prefix may have: half a cosine from 1 to 0 over the
    steps, or always 1 (GKD's off-policy share: the teacher's response, then the student)."""
    beta: float = 0.001
    """Weight of -log q(x) on teacher tokens."""

    def __post_init__(self) -> None:
        _require(self.prefixed_per_prompt >= 0, "guidance.prefixed_per_prompt must be >= 0.")
        _require(self.beta >= 0, f"guidance.beta must be >= 0, found {self.beta}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, by Megatron-Core's optimizer, scheduler and schedules."""

    steps: int
    """Optimizer steps of the run (T of the prefix schedule)."""
    lr: float = 5e-6
    """Peak learning rate of Adam."""
    min_lr: float = 0.0
    """Learning rate at the end of a decaying schedule."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Adam's two averaging constants."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    tokens_per_micro_batch: int = 16384
    """Padded tokens one micro-batch may hold on one data-parallel rank (memory knob)."""
    seed: int = 1234
    """Keys every random draw: prompt order, sampling, trust-region mask, prefixes."""

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_micro_batch"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name} must be at least 1, found {value}.")
        _require(self.lr > 0, f"train.lr must be above 0, found {self.lr}.")
        _require(0 <= self.min_lr <= self.lr, "train.min_lr must be between 0 and train.lr.")
        _require(0 <= self.warmup_steps <= self.steps, "train.warmup_steps must be in 0..steps.")
        _require(self.clip_grad >= 0, "train.clip_grad must be >= 0 (0: no clipping).")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out problems, before, during and after the run."""

    problems: str | None = field(default=None, metadata=PATH)
    """JSON lines of held-out problems, {"prompt", "answer"} for exact_match. None: none."""
    task: Literal["exact_match", "reverse_kl"] = "exact_match"
    """exact_match: greedy answers graded; reverse_kl: exact KL(student || teacher) per token on
    fresh student samples, measured with transformers."""
    num_problems: int = 500
    """How many of them, from the top of the file."""
    every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    max_new_tokens: int | None = None
    """Longest answer; None: rollout.max_new_tokens."""

    def __post_init__(self) -> None:
        _require(self.num_problems >= 1, "evaluation.num_problems must be at least 1.")
        _require(self.every >= 0, "evaluation.every must be >= 0.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run's folder and what is kept in it."""

    dir: str
    """Folder of the run, made if absent; the same command in the same folder resumes."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step is always kept; 0: only the last."""
    keep_checkpoints: int = 2
    """Newest complete checkpoints kept."""
    timeout_minutes: float = 30.0
    """Longest a phase of a step may last, rollout and evaluation included, before the run is taken
    to hang and ends (exit code 75)."""
    trajectories_every: int = 25
    """Steps between dumps of example trajectories with per-token values; 0: none."""
    num_trajectories: int = 8
    """Trajectories of one dump."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""

    def __post_init__(self) -> None:
        _require(bool(self.dir), "run.dir must name a folder, found an empty string.")
        _require(self.checkpoint_every >= 0, "run.checkpoint_every must be >= 0.")
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints must be at least 1.")
        _require(self.timeout_minutes > 0, "run.timeout_minutes must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One distillation run."""

    model: ModelConfig
    rollout: RolloutConfig
    train: TrainConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        world, engines = self.parallel.world_size, self.rollout.num_engines
        _require(
            self.rollout.placement == "separate" or world % engines == 0,
            f"rollout.num_engines must divide the world size {world} (tensor x pipeline x data), "
            f"found {engines}.",
        )
        _require(
            self.guidance.prefixed_per_prompt <= self.rollout.samples_per_prompt,
            f"guidance.prefixed_per_prompt = {self.guidance.prefixed_per_prompt} exceeds "
            f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}.",
        )
        exact_probabilities = self.rollout.temperature == 1 and self.rollout.top_p == 1
        _require(
            self.loss.importance == "none" or exact_probabilities,
            f"loss.importance = {self.loss.importance!r} needs rollout.temperature = 1 and "
            f"rollout.top_p = 1, found {self.rollout.temperature} and {self.rollout.top_p}: the "
            "engine reports probabilities at temperature 1 over the whole vocabulary. Change one.",
        )
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        _require(
            samples % self.parallel.data == 0,
            f"rollout.prompts_per_step x samples_per_prompt = {samples} must be divisible by "
            f"parallel.data = {self.parallel.data}: every replica trains on equally many "
            "trajectories. Change one of the three.",
        )

    @property
    def max_answer_tokens(self) -> int:
        """Longest answer of an evaluation."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens


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
    path = Path(path)
    tables = read_toml(path, "Config file")
    _anchor_paths(tables, path.resolve().parent)
    for override in overrides:
        _apply_override(tables, override)
    config = _build(Config, tables, "")
    run = dataclasses.replace(config.run, dir=os.path.expanduser(config.run.dir))
    return dataclasses.replace(config, run=run)


def read_toml(
    path: Path, what: str, *, otherwise: str = "Give the path of a TOML file."
) -> dict[str, Any]:
    """The tables of a file of settings.

    Args:
        path: the file.
        what: how messages call it: "Config file".
        otherwise: what to do where it does not exist.

    Raises:
        ConfigError: it does not exist, is a folder, cannot be read, is not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist. {otherwise}") from None
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read ({error.strerror}). Give the path of a TOML file."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not UTF-8, as TOML is: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Give the path of a TOML file, or save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{what} {path} is not valid TOML: {error}") from None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary of every setting, JSON-ready."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_to_toml(config: Config) -> str:
    """Every setting as a TOML file that :func:`load_config` reads from anywhere.

    Input paths are absolute, as in any loaded config; so must ``run.dir`` be.
    """
    lines = []
    for section, table in config_to_dict(config).items():
        lines.append(f"\n[{section}]")
        # A JSON value is a TOML value, but for null: TOML leaves out what is None by default.
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}"
            for key, value in table.items()
            if value is not None
        ]
    return "\n".join(lines) + "\n"


def config_from_dict(tables: dict[str, Any]) -> Config:
    """Inverse of :func:`config_to_dict` (resolved JSON of a run folder)."""
    return _build(Config, tables, "")


def settings_from_table(cls: Any, table: dict[str, Any]) -> Any:
    """An instance of a dataclass of settings, checked as strictly as a config.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or does not fit.
    """
    return _build(cls, table, "")


def _sections() -> dict[str, Any]:
    hints = typing.get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config)}


def _anchor_paths(tables: dict[str, Any], folder: Path) -> None:
    for name, section in _sections().items():
        table = tables.get(name)
        if not isinstance(table, dict):
            continue
        for f in fields(section):
            value = table.get(f.name)
            if f.metadata.get("path") and isinstance(value, str):
                table[f.name] = str(folder / Path(value).expanduser())


def _apply_override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section_name, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise ConfigError(f"Override {override!r} must look like section.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    section = _sections().get(section_name)
    if section is not None and isinstance(value, str):
        is_path = any(f.name == name and f.metadata.get("path") for f in fields(section))
        if is_path:
            value = str(Path(value).expanduser().resolve())
    table = tables.setdefault(section_name, {})
    _require(isinstance(table, dict), f"[{section_name}] must be a table, found {table!r}.")
    table[name] = value


def _build(cls: Any, table: Any, where: str) -> Any:
    _require(isinstance(table, dict), f"[{where}] must be a table, found {table!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    prefix = f"{where}." if where else ""
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else ""
            raise ConfigError(
                f"Unknown config key {prefix}{name}.{hint} Known here: {', '.join(known)}."
            )
    values = {}
    for name, f in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"Config key {prefix}{name} is missing and has no default.")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        _require(value in args, f"{where} must be one of {list(args)}, found {value!r}.")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, found {value!r}.")
        element = args[0]
        _require(
            args[-1] is Ellipsis or len(value) == len(args),
            f"{where} must have {len(args)} elements, found {value!r}.",
        )
        return tuple(_convert(element, item, where) for item in value)
    if origin is dict:
        _require(isinstance(value, dict), f"{where} must be a table, found {value!r}.")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    good = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    _require(good, f"{where} must be {hint.__name__}, found {value!r} ({type(value).__name__}).")
    return value
