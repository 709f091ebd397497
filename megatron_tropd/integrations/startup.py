"""What the plug-in refuses before the first step: versions, arguments, a teacher that does not fit.

Nothing here imports ``megatron.training``; arguments are Megatron's parsed namespace.
"""

import re
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import LossSettings, ParallelConfig, TeacherConfig
from megatron_tropd.config.run import apply_override, settings_from_table
from megatron_tropd.config.settings import Amount, check_value
from megatron_tropd.convert.checks import check_parallel, check_tensors
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import (
    MegatronFolder,
    NoCompanions,
    is_megatron_folder,
)
from megatron_tropd.data.tokenizers import check_same_tokenizer, load_tokenizer
from megatron_tropd.integrations import options
from megatron_tropd.losses.method import Method
from megatron_tropd.losses.signals import HiddenStatesSignal, TopKSignal, check_signal
from megatron_tropd.teacher.cached import check_cache
from megatron_tropd.teacher.served import ServedTeacher, meet_servers

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
    table: dict[str, dict[str, Any]] = {"loss": {"method": args.tropd_method}}
    for given in args.tropd_set or ():
        apply_override(table, f"loss.{given}")
    short = {name: getattr(args, f"tropd_{name}") for name in _SHORT}
    table["loss"] |= {name: value for name, value in short.items() if value is not None}
    try:
        config: Method = settings_from_table(LossSettings, table["loss"], "loss")
    except ConfigError as error:
        raise ConfigError(_in_options(error)) from None
    if args.tropd_top_k is not None and not _with_one(table["loss"]).needs.top_k:
        raise ConfigError(
            f"--tropd-method {args.tropd_method} does not read --tropd-top-k, which would change "
            "nothing. Drop it, or choose a method that does (docs/losses.md)."
        )
    needs = config.needs
    unmet = {
        "a second frozen model": needs.reference,
        "graded rollouts": needs.outcomes,
        "golden answers": needs.golden,
    }
    if any(unmet.values()):
        raise ConfigError(
            f"--tropd-method {args.tropd_method} needs "
            f"{' and '.join(name for name, is_unmet in unmet.items() if is_unmet)}, which the "
            "plug-in does not load. Use the trainer (tropd distill) or another method."
        )
    if left_out := [name for name in _LEFT_OUT if getattr(config, name)]:
        raise ConfigError(
            f"--tropd-set {' '.join(left_out)}: which tokens have a loss, the data say (weights, "
            "loss_mask); the plug-in leaves none of them out. Drop it, and give these tokens the "
            "weight 0 in the dataset."
        )
    return config


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


def served_teacher(
    folder: HFFolder | MegatronFolder, args: Namespace, layout: Any, *, vocab_size: int
) -> ServedTeacher:
    """Meet the servers of ``--tropd-teacher-address``; collective.

    Raises:
        ServersLost: none has answered for too long.
        InputError, ConfigError: a server is not the teacher, or not started as it must be.
    """
    top_k = loss_config(args).needs.top_k
    servers = meet_servers(
        TeacherConfig(placement="served", address=tuple(args.tropd_teacher_address)),
        folder,
        layout,
        top_k=top_k,
        vocab_size=vocab_size,
        longest=args.seq_length,
        dtype=args.params_dtype,
        minutes=args.distributed_timeout_minutes,
    )
    return ServedTeacher(servers, layout, top_k=top_k)


def layout_of(args: Namespace, hf_config: dict[str, Any]) -> ParallelConfig:
    """The student's layout for the teacher, whose expert ranks a dense teacher does not see."""
    dense = model_shape(hf_config).experts is None
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


def open_teacher(args: Namespace, vocab_size: int) -> HFFolder | MegatronFolder:
    """Open ``--tropd-teacher-load`` and check that it can teach this student.

    Args:
        vocab_size: ids of the student's tokenizer.

    Raises:
        InputError: it is no model folder, not whole, or has another tokenizer.
        ConfigError: its layers, heads or vocabulary do not fit.
    """
    path, hf = args.tropd_teacher_load, args.tropd_teacher_hf_config
    try:
        of_megatron, served = is_megatron_folder(path), args.tropd_teacher_address is not None
        folder = MegatronFolder(path, hf) if of_megatron else HFFolder(path, weights=not served)
    except NoCompanions as error:
        raise InputError(f"{error} Or give --tropd-teacher-hf-config and that folder.") from None
    if isinstance(folder, HFFolder) and folder.names:
        check_tensors(folder)
    cached = args.tropd_teacher_cache is not None
    loaded = not (cached or served)
    signal = HiddenStatesSignal if loaded else TopKSignal
    try:
        if loaded:
            check_parallel(folder.config, layout_of(args, folder.config), who="teacher")
        check_signal(loss_config(args), signal, vocab_size=vocab_size)
    except ConfigError as error:
        raise ConfigError(_in_options(error)) from None
    if loaded:
        _check_expert_shards(args, folder)
        _check_mask_is_read(args, folder)
    shape = model_shape(folder.config)
    if shape.vocab < vocab_size:
        raise ConfigError(
            f"Expected a teacher with at least the {vocab_size} ids of the student's tokenizer, "
            f"found vocab_size = {shape.vocab} in {folder.companions}. Choose a "
            "teacher with the same tokenizer."
        )
    if args.seq_length > shape.context:
        raise ConfigError(
            f"Expected --seq-length of at most the teacher's context of {shape.context} "
            f"tokens, found {args.seq_length}. Lower it."
        )
    _check_tokenizer(args, folder)
    if cached:
        _check_scores(args, folder, vocab_size)
    return folder


def _check_scores(args: Namespace, folder: HFFolder | MegatronFolder, vocab_size: int) -> None:
    """Refuse scores of something else; each trajectory is looked up when it is drawn."""
    if args.tropd_trajectories is None:
        raise ConfigError(
            "--tropd-teacher-cache holds the scores of recorded trajectories, found no "
            "--tropd-trajectories. Give the file that `tropd score` read."
        )
    loss, tokenizer = loss_config(args), student_tokenizer(args)
    check_cache(args.tropd_teacher_cache, loss, folder, tokenizer, vocab_size)


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
        text = text.replace(ours, theirs)
    return re.sub(r"loss\.(\w+)", _option_of, text)


def _option_of(setting: re.Match[str]) -> str:
    name = setting[1]
    short = name == "method" or name in _SHORT
    return f"--tropd-{name.replace('_', '-')}" if short else f"--tropd-set {name}"
