"""Whether what a loss is given fits together, in words that say what to change.

Shape suffixes: T = tokens, v = this rank's shard, H = hidden.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import LossSettings
from megatron_tropd.losses.signals import (
    FullSignal,
    HiddenStatesSignal,
    TeacherSignal,
    TopKSignal,
    split_reference,
)
from megatron_tropd.losses.targets import LossTargets
from megatron_tropd.losses.tensors import check_tensors, with_allowed_values
from megatron_tropd.losses.vocab_parallel import Shard, shard_of


def shard_of_signal(signal: FullSignal, group: dist.ProcessGroup | None, who: str) -> Shard:
    """Where the columns of a model lie; raises ValueError if its tensors are of the wrong kind."""
    check_tensors(**{who: signal})
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
        main_grad.shape != weight_vH.shape
        or main_grad.dtype != torch.float32
        or main_grad.device != weight_vH.device
    ):
        raise ValueError(
            f"Expected main_grad of float32 {list(weight_vH.shape)} on {weight_vH.device}, as the "
            f"output layer, found {main_grad.dtype} {list(main_grad.shape)} on "
            f"{main_grad.device}. Pass the buffer of that very weight."
        )
    for part in split_reference(signal):
        if isinstance(part, FullSignal):
            teacher = shard_of_signal(part, shard.group, "teacher")
            if teacher.bounds != shard.bounds:
                raise other_bounds(teacher, shard)


def other_bounds(teacher: Shard, student: Shard) -> ValueError:
    """The error of two models sharded at different columns."""
    return ValueError(
        f"Expected a teacher sharded at the student's columns {list(student.bounds)}, found "
        f"{list(teacher.bounds)}. Move its output layer once with align_output_weight, or pad both "
        "vocabularies to one width."
    )


def check_inputs(
    student: FullSignal,
    targets: LossTargets,
    signal: TeacherSignal,
    config: LossSettings,
    who: str = "teacher",
) -> tuple[LossTargets, TeacherSignal]:
    """Check everything that a loss is given against what it needs.

    Args:
        student: its logits or hidden states.
        targets: the tokens.
        signal: the teacher.
        config: which loss.
        who: whose signal it is.

    Returns:
        Targets and signal in float32, nan where a value is not allowed and the device cannot be
        asked without waiting for it (``tensors.VALUES``).

    Raises:
        ConfigError: the vocabularies or the top-k do not fit.
        ValueError: a tensor is missing or of the wrong shape, type, device or, on a CPU, value.
    """
    check_tensors(student=student, targets=targets, **{who: signal})
    if isinstance(signal, FullSignal) and signal.vocab_size != student.vocab_size:
        raise ConfigError(
            f"Expected a {who} with the student's vocabulary of {student.vocab_size} tokens, "
            f"found {signal.vocab_size}. Give both the size of the tokenizer they share."
        )
    top_k = config.needs.top_k
    if top_k and not isinstance(signal, FullSignal):
        width = width_of_top_k(signal)
        if width < top_k:
            raise ConfigError(
                f"loss.top_k = {top_k} needs as many teacher ids per token, found {width}. "
                f"Ask the teacher for {top_k} or set loss.top_k to {width}."
            )
    if config.needs.rollout_logprobs and targets.rollout_logprobs_T is None:
        raise ValueError(
            f"loss.method = {config.method_name()!r} weights tokens by importance, which needs "
            "targets.rollout_logprobs_T, the log-probs of the policy that sampled the tokens, "
            "found None. Pass them or set loss.importance to 'none'."
        )
    if config.needs.outcomes and targets.rewards_T is None:
        raise ValueError(
            f"loss.method = {config.method_name()!r} fits outcomes, which needs targets.rewards_T, "
            "how much better each token's sequence was than the prompt's others, found None. Pass "
            "them: a run takes them from rollout.recorded."
        )
    given = targets.is_golden_T is not None
    if config.needs.golden != given:
        found, advice = ("given", "Leave it out") if given else ("None", "Pass it")
        raise ValueError(
            f"loss.method = {config.method_name()!r} has {'no' if given else 'a'} loss for golden "
            f"answers, found targets.is_golden_T, which tells tokens apart, {found}. {advice}."
        )
    how: dict[str, Any] = dict(vocab_size=student.vocab_size, config=config)
    return (
        with_allowed_values("targets", targets, targets, **how),
        with_allowed_values(who, signal, targets, **how),
    )
