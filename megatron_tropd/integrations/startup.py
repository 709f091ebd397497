"""What the plug-in refuses before the first step: versions, arguments, a teacher that does not fit.

Nothing here imports ``megatron.training``; arguments are Megatron's parsed namespace.
"""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, LossSettings, ParallelConfig, TeacherConfig
from megatron_tropd.config.run import (
    SELF,
    SEPARATE,
    apply_override,
    config_from_dict,
    read_tables,
    reference_of,
    settings_from_table,
)
from megatron_tropd.config.settings import Amount, check_value
from megatron_tropd.convert.checks import check_parallel, check_tensors
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import (
    MegatronFolder,
    NoCompanions,
    is_megatron_folder,
)
from megatron_tropd.data.prompts import find_prompt, load_prompts
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import check_same_tokenizer, load_tokenizer
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.routing import routes_of_run
from megatron_tropd.integrations import options
from megatron_tropd.losses.method import Method
from megatron_tropd.losses.signals import check_signal
from megatron_tropd.teacher import signal_of
from megatron_tropd.teacher.cached import check_cache

SUPPORTED = ("0.17", "0.18", "0.19")
"""Versions of megatron-core whose training loop was run with the plug-in."""
REPLACED = (
    "get_forward_backward_func",
    "build_train_valid_test_data_iterators",
    "training_log",
    "print_rank_last",
)
"""What ``megatron.training.training`` must have: the plug-in puts its own in place of it."""
_OPTIONS = {
    "parallel.tensor ": "--tensor-model-parallel-size ",
    "parallel.tensor.": "--tensor-model-parallel-size.",
    "parallel.context": "--context-parallel-size",
    "parallel.pipeline x virtual_pipeline": "--pipeline-model-parallel-size x "
    "--num-virtual-stages-per-pipeline-rank",
    "parallel.pipeline": "--pipeline-model-parallel-size",
    "parallel.expert_tensor": "--expert-tensor-parallel-size",
    "parallel.expert": "--expert-model-parallel-size",
    "parallel.sequence_parallel = true": "--sequence-parallel",
}
"""The trainer's names of settings -> Megatron's options."""
_SHORT = ("top_k", "tau", "jsd_beta", "importance")
"""Settings of methods that have an option of their own; the others are ``--tropd-set``."""
_TABLES = ("model", "teacher", "teachers", "rollout")
"""What a file of settings has: where teachers are, and the prompts, whose lines say which of them
scores what, and what it reads."""
_STUDENT, _TRAJECTORIES = "the student of the script", "the script's data"
"""Stand for what the script has, and no source reads."""


_LEFT_OUT = ("mask_first_ids", "mask_truncated")
"""Settings that take the loss of tokens away: the trainer packs what its engines sampled, and knows
how it ended."""


def check_version() -> None:
    """Refuse a megatron-core that lacks what the plug-in stands on.

    Raises:
        ConfigError: names the version and what is missing.
    """
    import megatron.core as core

    version = str(core.__version__)
    missing = _missing()
    if missing:
        raise ConfigError(
            f"Expected megatron-core {SUPPORTED[0]} to {SUPPORTED[-1]}, found {version}, which "
            f"lacks {', '.join(missing)}. Install another version; megatron_tropd.losses alone "
            "needs none of this."
        )


def _missing() -> list[str]:
    from megatron.core.models.gpt import GPTModel

    missing = [] if hasattr(GPTModel, "_postprocess") else ["GPTModel._postprocess"]
    if find_spec("megatron.training") is None:
        return [*missing, "megatron.training (its training loop)"]
    from megatron.training import training

    for name in ("pretrain", *REPLACED):
        if not hasattr(training, name):
            missing.append(f"megatron.training.training.{name}")
    return missing


def loss_config(args: Namespace) -> Method:
    """The loss that the ``--tropd-*`` arguments describe.

    Raises:
        ConfigError: they do not fit together, or the loss needs what only the trainer has.
    """
    if args.tropd_method is None:
        raise ConfigError(
            "--tropd-teacher-load needs --tropd-method, a preset such as tropd or gkd_reverse_kl "
            "(docs/losses.md), found none."
        )
    table = _loss_table(args)
    try:
        config: Method = settings_from_table(LossSettings, table, "loss")
    except ConfigError as error:
        raise ConfigError(_in_options(error)) from None
    if args.tropd_top_k is not None and not _with_one(table).needs.top_k:
        raise ConfigError(
            f"--tropd-method {args.tropd_method} does not read --tropd-top-k, which would change "
            "nothing. Drop it, or choose a method that does (docs/losses.md)."
        )
    needs = config.needs
    unmet = {
        "a second frozen model": needs.reference and not is_settings(args),
        "graded rollouts": needs.outcomes,
        "golden answers": needs.golden,
    }
    if any(unmet.values()):
        raise ConfigError(
            f"--tropd-method {args.tropd_method} needs "
            f"{' and '.join(name for name, is_unmet in unmet.items() if is_unmet)}, which the "
            "plug-in does not load. Use the trainer (tropd distill) or another method. (A file of "
            "settings as --tropd-teacher-load has teacher.reference.)"
        )
    if left_out := [name for name in _LEFT_OUT if getattr(config, name)]:
        raise ConfigError(
            f"--tropd-set {' '.join(left_out)}: which tokens have a loss, the data say (weights, "
            "loss_mask); the plug-in leaves none of them out. Drop it, and give these tokens the "
            "weight 0 in the dataset."
        )
    return config


def _loss_table(args: Namespace) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {"loss": {"method": args.tropd_method}}
    for given in args.tropd_set or ():
        apply_override(table, f"loss.{given}")
    short = {name: getattr(args, f"tropd_{name}") for name in _SHORT}
    return table["loss"] | {name: value for name, value in short.items() if value is not None}


def _with_one(table: dict[str, Any]) -> Method:
    """The loss with a top-k, if it has any."""
    config: Method = settings_from_table(LossSettings, table | {"top_k": 1}, "loss")
    return config


def check_arguments(args: Namespace) -> None:
    """Refuse what the plug-in was not made for.

    Raises:
        ConfigError: names the option and what to change.
    """
    options.check_refused(args)
    if not args.calculate_per_token_loss:
        raise ConfigError(
            "--tropd-teacher-load needs --calculate-per-token-loss: micro-batches differ in their "
            "number of loss tokens. Add it."
        )
    _check_beside_scores(args)
    _check_micro_batches(args)
    if args.tropd_beta is not None:
        check_value(Amount, args.tropd_beta, "--tropd-beta")
    loss_config(args)


def _check_micro_batches(args: Namespace) -> None:
    """Refuse numbers of micro-batches that an interleaved pipeline would stop at in a step."""
    stages = args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size is None:
        return
    each = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size // each % stages:
        raise ConfigError(
            "The teacher's pass of an interleaved pipeline needs a number of micro-batches that is "
            f"a multiple of --pipeline-model-parallel-size {stages}, found --global-batch-size "
            f"{args.global_batch_size} / (--micro-batch-size {args.micro_batch_size} x "
            f"{args.data_parallel_size} replicas) = {args.global_batch_size // each}. Change one "
            "of them."
        )
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if getattr(args, name, None):
            raise ConfigError(
                f"--tropd-teacher-load does not go with --{name.replace('_', '-')} and an "
                "interleaved pipeline, which needs a multiple of its stages of micro-batches in "
                "every step. Drop one of the two."
            )


def _check_beside_scores(args: Namespace) -> None:
    """Refuse what needs a teacher that is loaded, beside one that is not."""
    options = {
        "--tropd-teacher-cache": args.tropd_teacher_cache,
        "--tropd-teacher-address": args.tropd_teacher_address,
    }
    given = [name for name, value in options.items() if value is not None]
    if is_settings(args):
        _check_beside_settings(args, given)
        return
    if not given:
        return
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: the teacher is at one place. Drop one.")
    if args.tropd_teacher_offload is not None:
        raise ConfigError(
            "--tropd-teacher-offload is for a teacher on the student's ranks, and with "
            f"{given[0]} none is loaded. Drop one of the two."
        )
    if args.tropd_metrics:
        raise ConfigError(
            f"--tropd-metrics compares both models over the vocabulary, and {given[0]} has the "
            "teacher's most likely ids alone. Drop one of the two."
        )
    resets = [n for n in ("reset_attention_mask", "reset_position_ids") if getattr(args, n, False)]
    if args.tropd_teacher_address is not None and resets:
        raise ConfigError(
            f"--{resets[0].replace('_', '-')} begins anew within a row, and the server of "
            "--tropd-teacher-address would read the row as one text. Drop one of the two."
        )


def _check_beside_settings(args: Namespace, given: Sequence[str]) -> None:
    """Refuse what a file of settings says itself, or has no room for."""
    path, others = args.tropd_teacher_load, ("offload", "hf_config")
    more = [n for n in others if getattr(args, f"tropd_teacher_{n}") is not None]
    if named := [*given, *(f"--tropd-teacher-{name.replace('_', '-')}" for name in more)]:
        raise ConfigError(
            f"{' and '.join(named)} beside --tropd-teacher-load {path}, whose [teacher] says that. "
            "Write it there (docs/teachers.md)."
        )
    config = run_config(args)
    if args.tropd_metrics and "full" not in signal_of(config).provides:
        raise ConfigError(
            f"--tropd-metrics compares both models over the vocabulary, and a teacher of {path} "
            "has its most likely ids alone. Drop it."
        )
    resets = [n for n in ("reset_attention_mask", "reset_position_ids") if getattr(args, n, False)]
    if resets and not _is_plain(config):
        raise ConfigError(
            f"--{resets[0].replace('_', '-')} begins anew within a row, and the teachers of {path} "
            "would read the row as one text: they have rows of their own. Drop one of the two."
        )


def layout_of(args: Namespace, hf_config: dict[str, Any] | None = None) -> ParallelConfig:
    """The student's layout, or that for a teacher: a dense one does not see its expert ranks."""
    dense = hf_config is None or model_shape(hf_config).experts is None
    return ParallelConfig(
        tensor=args.tensor_model_parallel_size,
        context=args.context_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual_pipeline=args.virtual_pipeline_model_parallel_size or 1,
        data=args.data_parallel_size,
        expert=1 if dense else args.expert_model_parallel_size,
        uneven_stages=True,
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
    )


def is_settings(args: Namespace) -> bool:
    """Whether ``--tropd-teacher-load`` is a file of settings, in place of a model."""
    return str(args.tropd_teacher_load).endswith(".toml")


def teacher_folders(args: Namespace) -> tuple[Path, ...]:
    """Name the folders of all teachers; raises ConfigError as :func:`run_config` does."""
    return tuple(Path(alone.model.teacher) for alone in run_config(args).by_teacher.values())


def run_config(args: Namespace) -> Config:
    """The settings of a run of ``tropd distill`` with the same teachers, layout and loss.

    What Megatron's loop does itself (data, optimizer, checkpoints) is in it only as far as a
    teacher's source asks for it.

    Raises:
        ConfigError: the teacher's settings, or these with Megatron's options, do not fit together.
    """
    tables = read_tables(args.tropd_teacher_load) if is_settings(args) else _of_options(args)
    if foreign := [name for name in tables if name not in _TABLES]:
        raise ConfigError(
            f"{args.tropd_teacher_load}: expected {', '.join(_TABLES)}, which say where teachers "
            f"are, found {', '.join(foreign)}: Megatron's options have that. Remove it."
        )
    rollout = {"prompts": _TRAJECTORIES, "recorded": _TRAJECTORIES} | tables.get("rollout", {})
    given = _Given(args)
    rollout |= {"max_new_tokens": args.seq_length, "prompts_per_step": given.rows}
    train = {"steps": 1, "tokens_per_micro_batch": given.positions}
    whole = {
        **tables,
        "model": {"student": _STUDENT} | tables.get("model", {}),
        "rollout": rollout | {"samples_per_prompt": 1},
        "loss": _loss_table(args),
        "train": train,
        "run": {"dir": _STUDENT, "timeout_minutes": given.minutes},
        "parallel": asdict(layout_of(args)),
    }
    try:
        config = config_from_dict(whole)
    except ConfigError as error:
        raise ConfigError(_in_options(error)) from None
    _check_own_weights(config)
    return config


@dataclass(frozen=True)
class _Given:
    """What a run's settings say in other units than Megatron's options."""

    args: Namespace

    @property
    def rows(self) -> int:
        """Of a global batch."""
        return int(getattr(self.args, "global_batch_size", None) or self.args.data_parallel_size)

    @property
    def positions(self) -> int:
        """Of a micro-batch."""
        return int(getattr(self.args, "micro_batch_size", None) or 1) * int(self.args.seq_length)

    @property
    def minutes(self) -> float:
        """Longest that a collective may take."""
        return float(getattr(self.args, "distributed_timeout_minutes", None) or 10)


def _of_options(args: Namespace) -> dict[str, dict[str, Any]]:
    """The tables of one teacher that ``--tropd-teacher-*`` describe."""
    cache, address = args.tropd_teacher_cache, args.tropd_teacher_address
    teacher: dict[str, Any] = {"offload": args.tropd_teacher_offload or "none"}
    if cache is not None:
        teacher = {"placement": "cached", "cache": cache}
    elif address is not None:
        teacher = {"placement": "served", "address": list(address)}
    return {"model": {"teacher": args.tropd_teacher_load}, "teacher": teacher}


def _check_own_weights(config: Config) -> None:
    """Refuse teachers made of the student, whose weights Megatron's loop has, or beside it."""
    for who, alone in config.by_teacher.items():
        if alone.teacher.placement == SEPARATE:
            raise ConfigError(
                f'{who}: placement = "{SEPARATE}" is for `tropd distill`: all ranks of Megatron\'s '
                'loop train. Set placement = "resident", or [teacher.parallel] beside it.'
            )
        is_self = alone.teacher.placement == SELF
        if not is_self and alone.reference != _STUDENT:
            continue
        found = 'placement = "self"' if is_self else 'reference = "student"'
        raise ConfigError(
            f"{who}: {found} is the student of `tropd distill`, whose weights the plug-in does not "
            "keep. Name the folder of the student's first weights; an average of them "
            "(teacher.ema_decay) is `tropd distill`'s alone."
        )


def open_teachers(
    args: Namespace, vocab_size: int, config: Config | None = None
) -> dict[str, HFFolder | MegatronFolder]:
    """Open the teachers of ``--tropd-teacher-load`` and check that they can teach this student.

    Args:
        vocab_size: ids of the student's tokenizer.
        config: of :func:`run_config`; None: made here.

    Returns:
        As ``distill.pair.build_teacher`` takes them.

    Raises:
        InputError: one is no model folder, not whole, or has another tokenizer.
        ConfigError: layers, heads or vocabulary do not fit.
    """
    config = config or run_config(args)
    folders = {}
    for who, alone in config.by_teacher.items():
        folder = folders[who] = _open(args, alone.model.teacher, alone.teacher.placement)
        named = {who: folder}
        if alone.reference is not None:
            named[reference_of(who)] = folders[reference_of(who)] = _open(args, alone.reference)
        for name, each in named.items():
            _check_model(args, alone, each, vocab_size, name)
        if alone.teacher.placement == "cached":
            _check_scores(args, alone, named, vocab_size)
    try:
        check_signal(config.loss, signal_of(config), vocab_size=vocab_size)
    except ConfigError as error:
        raise ConfigError(_in_options(error)) from None
    return folders


@dataclass(frozen=True)
class Teachers:
    """The teachers of a script, checked."""

    config: Config
    """Of a run with the same teachers."""
    folders: dict[str, HFFolder | MegatronFolder]
    routes: Routes | None
    """Whose the prompts are and what is read in their place, if that is to be known."""
    prompts: Sequence[Prompt]
    """Those of the routes."""
    longest: int
    """Tokens of the longest sequence that a teacher reads."""

    @property
    def deals_rows(self) -> bool:
        """Whether a source asks for sequences; else it scores the student's micro-batches."""
        return bool(self.routes) or not _is_plain(self.config)

    def check_prompts(self, sequences: Sequence[TokenSequence]) -> None:
        """Refuse rows that do not begin with the prompt whose teacher is looked up."""
        for sequence in sequences if self.routes is not None else ():
            prompt = find_prompt(self.prompts, sequence.key.prompt)
            if prompt is None or sequence.prompt_ids != list(prompt.token_ids):
                raise InputError(
                    f"Prompt {sequence.key.prompt}, sample {sequence.key.sample}: expected the ids "
                    f"that {self.config.rollout.prompts} has for this prompt, found others. The "
                    "lines of [rollout] prompts say which teacher scores what, so train on "
                    "trajectories that were sampled for them, with the same chat template."
                )


def _is_plain(config: Config) -> bool:
    """Whether there is one teacher, on the student's ranks in the student's layout."""
    teacher, resident = config.teacher, TeacherConfig()
    is_resident = teacher.placement == resident.placement and teacher.parallel is None
    return is_resident and teacher.context is None and not config.teachers


def teachers(args: Namespace, vocab_size: int) -> Teachers:
    """Read and check all that ``--tropd-teacher-load`` names.

    Args:
        vocab_size: ids of the student's tokenizer.

    Raises:
        ConfigError, InputError: as :func:`run_config` and :func:`open_teachers`; the prompts do not
            say what is to be known of them.
    """
    config = run_config(args)
    folders = open_teachers(args, vocab_size, config)
    routes, prompts = _routes(args, config, folders)
    contexts = {} if routes is None else routes.contexts
    longest = args.seq_length + max(map(len, contexts.values()), default=0)
    shared = [folder.config for folder in folders.values()]
    mixture = next((one for one in shared if model_shape(one).experts is not None), None)
    room = max(config.train.tokens_per_micro_batch, longest)
    config = replace(
        config,
        parallel=layout_of(args, mixture),
        train=replace(config.train, tokens_per_micro_batch=room),
    )
    return Teachers(config, folders, routes, prompts, longest)


def _routes(
    args: Namespace, config: Config, folders: Mapping[str, HFFolder | MegatronFolder]
) -> tuple[Routes | None, Sequence[Prompt]]:
    """Whose the trajectories' prompts are, if there are several teachers or contexts."""
    read = [alone.teacher.context for alone in config.by_teacher.values()]
    if not config.teachers and not any(read):
        return None, ()
    rollout, tokenizer = config.rollout, student_tokenizer(args)
    if rollout.prompts == _TRAJECTORIES or tokenizer is None:
        raise ConfigError(
            f"{args.tropd_teacher_load}: [[teachers]] and teacher.context look up the line of each "
            "trajectory's prompt: expected [rollout] prompts with the file that was sampled, and "
            "--tokenizer-type HuggingFaceTokenizer with a local folder, found "
            f"prompts = {rollout.prompts!r} and {args.tokenizer_type}. Add what is missing."
        )
    room = min(model_shape(folder.config).context for folder in folders.values()) - args.seq_length
    prompts = load_prompts(
        rollout.prompts,
        tokenizer,
        rollout,
        data=rollout.data,
        max_prompt_tokens=args.seq_length,
        filter_overlong=rollout.filter_overlong_prompts,
    )
    return routes_of_run(config, prompts, tokenizer, longest_context=room), prompts


def _open(args: Namespace, path: str, placement: str = "") -> HFFolder | MegatronFolder:
    hf = None if is_settings(args) else args.tropd_teacher_hf_config
    try:
        if is_megatron_folder(path):
            return MegatronFolder(path, hf)
        folder = HFFolder(path, weights=placement != "served")
    except NoCompanions as error:
        raise InputError(f"{error} Or give --tropd-teacher-hf-config and that folder.") from None
    if folder.names:
        check_tensors(folder)
    return folder


def _check_model(
    args: Namespace, alone: Config, folder: HFFolder | MegatronFolder, vocab_size: int, who: str
) -> None:
    """Refuse a teacher, or its reference, that cannot stand beside the student."""
    shape = model_shape(folder.config)
    if alone.loads_teacher:
        own, theirs = alone.teacher.parallel is not None, layout_of(args, folder.config)
        layout = alone.teacher_parallel if own else theirs
        try:
            check_parallel(folder.config, layout, who=who)
        except ConfigError as error:
            raise ConfigError(str(error) if own else _in_options(error)) from None
        if not own:
            _check_expert_shards(args, folder)
        _check_mask_is_read(args, folder)
    if shape.vocab < vocab_size:
        raise ConfigError(
            f"Expected a {who} with at least the {vocab_size} ids of the student's tokenizer, "
            f"found vocab_size = {shape.vocab} in {folder.companions}. Choose a "
            f"{who.split()[0]} with the same tokenizer."
        )
    if args.seq_length > shape.context:
        raise ConfigError(
            f"Expected --seq-length of at most the {who}'s context of {shape.context} "
            f"tokens, found {args.seq_length}. Lower it."
        )
    _check_tokenizer(args, folder)


def _check_scores(
    args: Namespace,
    alone: Config,
    folders: Mapping[str, HFFolder | MegatronFolder],
    vocab_size: int,
) -> None:
    """Refuse scores of something else; each trajectory is looked up when it is drawn."""
    if args.tropd_trajectories is None:
        raise ConfigError(
            "--tropd-teacher-cache holds the scores of recorded trajectories, found no "
            "--tropd-trajectories. Give the file that `tropd score` read."
        )
    teacher, *reference = folders.values()
    tokenizer = student_tokenizer(args)
    more: Any = {"reference": reference[0]} if reference else {}
    check_cache(alone.teacher.cache, alone.loss, teacher, tokenizer, vocab_size, **more)


def _check_expert_shards(args: Namespace, folder: HFFolder | MegatronFolder) -> None:
    mixture = model_shape(folder.config).experts is not None
    tensor = args.tensor_model_parallel_size
    if mixture and getattr(args, "expert_tensor_parallel_size", None) not in (None, tensor):
        raise ConfigError(
            "The teacher is a mixture of experts: expected --expert-tensor-parallel-size "
            f"{tensor}, as --tensor-model-parallel-size, found {args.expert_tensor_parallel_size}. "
            "Drop it."
        )


def _check_mask_is_read(args: Namespace, folder: HFFolder | MegatronFolder) -> None:
    """As ``options.check_refused`` of the student, for the teacher's attention."""
    from megatron_tropd.mcore.models import has_transformer_engine

    if not getattr(args, "reset_attention_mask", False):
        return
    if has_transformer_engine() or any(model_shape(folder.config).windows):
        raise ConfigError(
            "--reset-attention-mask needs a teacher without sliding windows and an environment "
            "without Transformer Engine: other attention of Megatron's does not read the mask. "
            "Drop it."
        )


def _check_tokenizer(args: Namespace, folder: HFFolder | MegatronFolder) -> None:
    """Ids mean the same in both; only Hugging Face tokenizers can be compared."""
    student = _tokenizer_folder(args)
    if student is not None:
        check_same_tokenizer(student, folder.companions)
    elif args.rank == 0:
        print(
            f"tropd: ids of --tokenizer-type {args.tokenizer_type} cannot be compared "
            f"with those of {folder.companions}; only their number was. Make sure that they are "
            "the same tokenizer.",
            flush=True,
        )


def student_tokenizer(args: Namespace) -> Any:
    """The student's transformers tokenizer; None where it has one of another kind."""
    folder = _tokenizer_folder(args)
    return None if folder is None else load_tokenizer(folder)


def _tokenizer_folder(args: Namespace) -> str | None:
    folder = args.tokenizer_model
    known = args.tokenizer_type == "HuggingFaceTokenizer" and folder and Path(folder).is_dir()
    return folder if known else None


def check_lone_arguments(args: Namespace) -> None:
    """Refuse ``--tropd-*`` arguments without a teacher; raises ConfigError."""
    given = [
        name
        for name, value in sorted(vars(args).items())
        if name.startswith("tropd_") and value is not None and value is not False
    ]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{shown} given without --tropd-teacher-load: expected the teacher's HF folder or "
            "Megatron checkpoint. Add it, or drop them for plain training."
        )


def _in_options(error: Exception) -> str:
    text = str(error)
    for ours, theirs in _OPTIONS.items():
        text = re.sub(rf"(?<!teacher\.){re.escape(ours)}", theirs, text)
    return re.sub(r"loss\.(\w+)", _option_of, text)


def _option_of(setting: re.Match[str]) -> str:
    name = setting[1]
    short = name == "method" or name in _SHORT
    return f"--tropd-{name.replace('_', '-')}" if short else f"--tropd-set {name}"
