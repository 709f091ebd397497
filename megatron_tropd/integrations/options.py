"""Megatron's options while distilling: each is honoured, harmless or refused by name.

``megatron_options.txt`` lists the first two, :data:`REFUSED` the third. What stands in neither is
an option that nobody has looked at: of a newer Megatron, or of the script itself.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.megatron_fields import named_lists


@dataclass(frozen=True)
class Refusal:
    """An option that would change the batch or the loss in a way the plug-in does not follow."""

    name: str
    """Attribute of Megatron's namespace."""
    why: str
    """Why not, or what to use."""
    off: Any = None
    """Value that asks for nothing, besides None, False, 0 and what is empty."""
    shown: str = ""
    """How the text calls it; without, the option of this name."""

    def is_asked_for(self, args: Namespace) -> bool:
        """Whether ``args`` ask for it."""
        value = getattr(args, self.name, self.off)
        return bool(value) and value != self.off

    def __str__(self) -> str:
        return self.shown or f"--{self.name.replace('_', '-')}"


_SHARDS = "the output layer is taken as tensor parallelism shards it"
REFUSED = (
    Refusal("hybrid_context_parallel", "all rows of a micro-batch are split alike"),
    Refusal("gtp_weight_remat_size", _SHARDS, off=1, shown="--tensor-parallel-num-weight-shards"),
    Refusal(
        "expert_gtp_weight_remat_size",
        _SHARDS,
        off=1,
        shown="--expert-tensor-parallel-num-weight-shards",
    ),
    Refusal("use_tp_pp_dp_mapping", "use the default order"),
    Refusal("use_torch_fsdp2", "use Megatron's DDP"),
    Refusal("use_megatron_fsdp", "use Megatron's DDP"),
    Refusal("inprocess_restart", "the teacher's process groups do not outlive a restart"),
    Refusal("mtp_num_layers", "there is one loss per token"),
    Refusal("fp16", "use --bf16 or 32 bits"),
    Refusal("fp16_lm_cross_entropy", "the loss is made in 32 bits"),
    Refusal("fp8_output_proj", "the output layer is not run"),
    Refusal("defer_embedding_wgrad_compute", "the output layer is not run"),
    Refusal("use_mup", "it scales the logits, which are not made"),
    Refusal("hybrid_layer_pattern", "use a GPTModel"),
    Refusal("hybrid_override_pattern", "use a GPTModel"),
    Refusal("is_hybrid_model", "use a GPTModel"),
    Refusal("use_legacy_models", "use a GPTModel"),
    Refusal("overlap_moe_expert_parallel_comm", "it has a schedule of its own"),
    Refusal("perform_rl_step", "it has data of its own"),
    Refusal("rl_use_sequence_packing", "it has data of its own"),
    Refusal(
        "dataloader_inter_document_masking",
        "its rows are told apart by cu_seqlens, which the models do not get here; "
        "--reset-attention-mask hides the other documents, too, where they end in the EOD token",
    ),
    Refusal(
        "sft",
        "its rows are packed conversations, told apart by cu_seqlens, which the models do not get "
        "here; --tropd-trajectories takes conversations with loss_weights "
        "(docs/recorded_rollouts.md)",
    ),
    Refusal("logits_load_dir", "it is a distillation loss of its own, from logits on disk"),
    Refusal("logits_save_dir", "the output layer is not run, so there are no logits to save"),
    Refusal("freeze_all_layers", "nothing would be trained"),
    Refusal("export_kd_teacher_load", "it is ModelOpt's own distillation"),
    Refusal("export_offline_model", "the student would have no layers"),
    Refusal("yaml_cfg", "it replaces the command line"),
)
"""What :func:`check_refused` looks for; CUDA graphs of full iterations it knows by itself."""
_SEEN_OTHERWISE = frozenset(
    (
        *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
        *("cuda_graph_impl", "cuda_graph_scope"),
    )
)
"""Options that are refused by an attribute that Megatron derives from them."""
_INSTEAD = "--tropd-trajectories stands in place of the text and its validation"
_NO_MASK = "trajectories are one to a row, with a loss where their loss_weights say"
BESIDE_ROLLOUTS = (
    *(
        Refusal(name, _NO_MASK)
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    ),
    Refusal("iterations_to_skip", "Megatron skips text only"),
)
"""What trajectories in place of text leave no room for, be they fresh or recorded."""
BESIDE_TRAJECTORIES = (
    *(
        Refusal(name, _INSTEAD)
        for name in (
            *("data_path", "train_data_path", "valid_data_path", "test_data_path"),
            *("data_args_path", "per_split_data_args_path", "mock_data", "fim_data"),
            *("full_validation", "multiple_validation_sets", "skip_train"),
        )
    ),
    *BESIDE_ROLLOUTS,
)
"""What ``--tropd-trajectories`` leaves no room for."""


def check_refused(args: Namespace) -> None:
    """Refuse what the plug-in was not made for.

    Raises:
        ConfigError: names the option and what to change.
    """
    for refusal in REFUSED:
        _refuse(args, refusal, "--tropd-teacher-load")
    if getattr(args, "cuda_graph_impl", "none") == "full_iteration" or (
        "full_iteration" in str(getattr(args, "cuda_graph_scope", ""))
    ):
        raise ConfigError(
            "--tropd-teacher-load does not go with CUDA graphs of full iterations: lengths differ "
            "between steps. Drop --cuda-graph-impl full_iteration."
        )
    _check_mask_is_read(args)
    if getattr(args, "tropd_trajectories", None) is None:
        return
    for refusal in BESIDE_TRAJECTORIES:
        _refuse(args, refusal, "--tropd-trajectories")
    if getattr(args, "dataloader_type", None) == "external":
        raise ConfigError(
            "--tropd-trajectories does not go with --dataloader-type external: Megatron's loaders "
            "read them. Use single or cyclic."
        )


def check_beside_rollouts(args: Namespace) -> None:
    """Refuse what fresh trajectories leave no room for; raises ConfigError."""
    for refusal in BESIDE_ROLLOUTS:
        _refuse(args, refusal, "distillation(rollouts)")


def _check_mask_is_read(args: Namespace) -> None:
    """Megatron's causal attention reads a given mask in its plainest implementation only."""
    if not getattr(args, "reset_attention_mask", False):
        return
    fused = getattr(args, "bf16", False) and getattr(args, "masked_softmax_fusion", False)
    needed = {
        "--transformer-impl local": getattr(args, "transformer_impl", "local") != "local",
        "--no-masked-softmax-fusion": fused,
        "no --window-size": bool(getattr(args, "window_size", None)),
    }
    if missing := [option for option, is_missing in needed.items() if is_missing]:
        raise ConfigError(
            f"--reset-attention-mask needs {', '.join(missing)}: other attention of Megatron's "
            "hides what comes later and nothing else. Change that, or drop it."
        )


def _refuse(args: Namespace, refusal: Refusal, beside: str) -> None:
    if refusal.is_asked_for(args):
        raise ConfigError(f"{beside} does not go with {refusal}: {refusal.why}. Drop it.")


def check_unknown(args: Namespace, defaults: dict[str, list[Any]], accepted: list[str]) -> None:
    """Refuse options of Megatron's that nobody has looked at and that are not as by default.

    Raises:
        ConfigError: names them and what to do.
    """
    known = reviewed() | named(accepted)
    unknown = [
        name
        for name, values in defaults.items()
        if name not in known and getattr(args, name, values[0]) not in values
    ]
    if unknown:
        options = " ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ConfigError(
            f"{options}: options that this version of megatron_tropd does not know, so that it "
            "cannot say whether they change the batch or the loss. Drop them; or, if they change "
            f"neither, add --tropd-accept-options {' '.join(unknown)}."
        )


def named(accepted: list[str]) -> frozenset[str]:
    """Attributes of the options of ``--tropd-accept-options``, with dashes or without."""
    return frozenset(name.lstrip("-").replace("-", "_") for name in accepted)


def of_the_script(args: Namespace, parser: ArgumentParser, known: Set[str]) -> list[str]:
    """Options that the script adds to Megatron's and that are not as by default.

    Args:
        known: Megatron's options, and those that were accepted.
    """
    known = known | reviewed()
    return [
        action.option_strings[0]
        for action in parser._actions
        if action.option_strings
        and action.dest not in known
        and not action.dest.startswith("tropd_")
        and getattr(args, action.dest, action.default) != action.default
    ]


def megatron_defaults() -> dict[str, list[Any]]:
    """Option (argparse's dest) of the installed Megatron -> its defaults; some have two."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(add_help=False, allow_abbrev=False))
    try:
        from megatron.post_training.arguments import add_modelopt_args
    except ImportError:
        pass  # a wheel has none
    else:
        parser = add_modelopt_args(parser)
    defaults: dict[str, list[Any]] = {}
    for action in parser._actions:
        defaults.setdefault(action.dest, []).append(action.default)
    return defaults


@cache
def reviewed() -> frozenset[str]:
    """All options that somebody has looked at, of every supported version."""
    refused = {refusal.name for refusal in REFUSED} | _SEEN_OTHERWISE
    return frozenset().union(*classes().values()) | refused


@cache
def classes() -> dict[str, frozenset[str]]:
    """``megatron_options.txt``: honoured, harmless, older and modelopt -> names."""
    lists = named_lists("megatron_tropd.integrations", "megatron_options.txt")
    return {name: frozenset(names) for name, names in lists}
