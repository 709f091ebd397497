"""Whether what a loss is given fits together, in words that say what to change.

Shape suffixes: T = tokens, v = this rank's shard, H = hidden.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.loss_config import LossConfig
from megatron_tropd.losses.signals import (
    FullSignal,
    HiddenStatesSignal,
    LogitsSignal,
    TeacherSignal,
    TopKSignal,
)
from megatron_tropd.losses.targets import LossTargets
from megatron_tropd.losses.vocab_parallel import Shard, shard_of


def shard_of_signal(signal: FullSignal, group: dist.ProcessGroup | None, who: str) -> Shard:
    """Where the columns of a model lie; raises ValueError if its tensors are of the wrong kind."""
    check_signal_tensors(signal, who)
    return shard_of(signal.width, vocab_size=signal.vocab_size, group=group, bounds=signal.bounds)


def width_of_top_k(signal: TeacherSignal) -> int:
    """Ids per token that a signal brings along; 0 where it has logits instead."""
    return signal.topk_ids_TK.shape[-1] if isinstance(signal, TopKSignal) else 0


def check_products(
    student: HiddenStatesSignal,
    signal: TeacherSignal,
    shard: Shard,
    main_grad: Tensor | None = None,
) -> None:
    """Output layer's gradient buffer and the teacher's columns; raises ValueError."""
    weight_vH = student.output_weight_vH
    if main_grad is not None and (
        main_grad.shape != weight_vH.shape or main_grad.dtype != torch.float32
    ):
        raise ValueError(
            f"Expected main_grad of float32 {list(weight_vH.shape)}, as the output layer, found "
            f"{main_grad.dtype} {list(main_grad.shape)}. Pass the buffer of that very weight."
        )
    if isinstance(signal, FullSignal):
        teacher = shard_of_signal(signal, shard.group, "teacher")
        if teacher.bounds != shard.bounds:
            raise other_bounds(teacher, shard)


def check_signal_tensors(signal: TeacherSignal, who: str) -> None:
    """Shapes and dtypes of what a model brings along; raises ValueError.

    Args:
        signal: the teacher's, or the student's own logits or hidden states.
        who: how messages call it.
    """
    if isinstance(signal, LogitsSignal):
        _check_matrix(signal.logits_Tv, f"{who} logits", "[T, v]")
    elif isinstance(signal, HiddenStatesSignal):
        _check_matrix(signal.hidden_TH, f"{who} hidden states", "[T, H]")
        _check_matrix(signal.output_weight_vH, f"{who} output layer", "[v, H]")
        _check_multipliable(signal.hidden_TH, signal.output_weight_vH, who)
    elif isinstance(signal, TopKSignal):
        shapes = list(signal.topk_ids_TK.shape), list(signal.topk_logprobs_TK.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2:
            raise ValueError(
                f"Expected ids and log-probs [T, K] of the {who}'s top-k, found {shapes[0]} and "
                f"{shapes[1]}. Take both from the same answer."
            )


def _check_matrix(tensor: Tensor, what: str, shape: str) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(
            f"Expected {what} {shape} of a floating-point type, found {tensor.dtype} "
            f"{list(tensor.shape)}. Flatten batch and sequence into tokens, and pass logits or "
            "activations."
        )


def _check_multipliable(hidden_TH: Tensor, weight_vH: Tensor, who: str) -> None:
    if hidden_TH.shape[1] != weight_vH.shape[1]:
        raise ValueError(
            f"Expected {who} hidden states [T, H] and an output layer [v, H] of one H, found "
            f"{list(hidden_TH.shape)} and {list(weight_vH.shape)}. Pass the {who}'s own output "
            "layer."
        )
    if hidden_TH.dtype != weight_vH.dtype:
        raise ValueError(
            f"Expected {who} hidden states in the output layer's {weight_vH.dtype}, found "
            f"{hidden_TH.dtype}. Convert one of them."
        )


def other_bounds(teacher: Shard, student: Shard) -> ValueError:
    """The error of two models sharded at different columns."""
    return ValueError(
        f"Expected a teacher sharded at the student's columns {list(student.bounds)}, found "
        f"{list(teacher.bounds)}. Move its output layer once with align_output_weight, or pad both "
        "vocabularies to one width."
    )


def check_inputs(
    student: FullSignal, targets: LossTargets, signal: TeacherSignal, config: LossConfig
) -> None:
    """Lengths, vocabulary, top-k, rollout log-probs and ids; raises ConfigError, ValueError."""
    check_signal_tensors(signal, "teacher")
    given = {name: value for name, value in vars(targets).items() if value is not None}
    _check_targets(given)
    num = student.num_tokens
    found = {f"targets.{name}": len(value) for name, value in given.items()}
    found["the teacher signal"] = signal.num_tokens
    if wrong := {name: count for name, count in found.items() if count != num}:
        raise ValueError(
            f"Expected {num} tokens everywhere, as the student has, found {wrong}. Cut all of them "
            "from the same micro-batch."
        )
    if isinstance(signal, FullSignal) and signal.vocab_size != student.vocab_size:
        raise ConfigError(
            f"Expected a teacher with the student's vocabulary of {student.vocab_size} tokens, "
            f"found {signal.vocab_size}. Give both the size of the tokenizer they share."
        )
    if config.support and not isinstance(signal, FullSignal):
        width = width_of_top_k(signal)
        if width < config.support:
            raise ConfigError(
                f"loss.top_k = {config.top_k} needs as many teacher ids per token, found {width}. "
                f"Ask the teacher for {config.top_k} or set loss.top_k to {width}."
            )
    if config.importance != "none" and targets.rollout_logprobs_T is None:
        raise ValueError(
            f"loss.importance = {config.importance!r} needs targets.rollout_logprobs_T, the "
            "log-probs of the policy that sampled the tokens, found None. Pass them or set "
            "loss.importance to 'none'."
        )
    _check_ids(targets.ids_T, student.vocab_size, "targets.ids_T")
    if isinstance(signal, TopKSignal):
        _check_ids(signal.topk_ids_TK, student.vocab_size, "the teacher's top-k")


def _check_targets(given: dict[str, Tensor]) -> None:
    kinds = {"ids_T": torch.int64, "is_teacher_T": torch.bool}
    for name, tensor in given.items():
        right = tensor.is_floating_point() if name not in kinds else tensor.dtype == kinds[name]
        if tensor.dim() != 1 or not right:
            raise ValueError(
                f"Expected targets.{name} [T] of {kinds.get(name, 'a floating-point type')}, found "
                f"{tensor.dtype} {list(tensor.shape)}. One entry per token."
            )


def _check_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    # A GPU would have to be waited for; there a wrong id fails in the gather itself.
    if ids.is_cuda or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"Expected token ids in 0..{vocab_size - 1} in {what}, found {low}..{high}. Check the "
            "tokenizer of the trajectories against the model."
        )
