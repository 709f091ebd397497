"""The dense passes again, in float64, each formula by itself.

Written from the formulas, sharing nothing with ``megatron_tropd.losses``.
"""

import math

import torch
from torch import Tensor


def normaliser(logits: Tensor) -> Tensor:
    """[T, 2] float32 largest logit and log of the sum of exp(logit - largest)."""
    logits = logits.double()
    largest = logits.amax(-1, keepdim=True)
    return torch.cat([largest, torch.logsumexp(logits, -1, keepdim=True) - largest], -1).float()


def sums(student: Tensor, teacher: Tensor, spec) -> Tensor:
    """[T, D] float64 sums of ``spec.sums`` over whole rows of logits."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    q, p = log_q.exp(), log_p.exp()
    made = {
        "tv": (p - q).abs() / 2,
        "reverse_kl": _weighted(q, log_q - log_p),
        "forward_kl": _weighted(p, log_p - log_q),
        "student_entropy": _weighted(q, -log_q),
        "teacher_entropy": _weighted(p, -log_p),
        "teacher_to_mixture": _weighted(p, log_p - _log_mixture(log_q, log_p, spec.mix)),
    }
    if "reward" in spec.sums:
        made["reward"] = reward(student, teacher, spec)
    columns = [made[name].sum(-1) for name in spec.sums]
    return torch.stack(columns, -1) if columns else student.new_zeros(len(student), 0).double()


def gradient(student: Tensor, teacher: Tensor, factors, spec) -> Tensor:
    """[T, v] float64 student factor x q + reward factor x w + teacher factor x p."""
    of_student, of_reward, of_teacher = (factor.double().cpu().unsqueeze(-1) for factor in factors)
    total = of_student * _log_softmax(student).exp()
    if spec.teacher:
        total = total + of_teacher * _log_softmax(teacher).exp()
    if spec.reward:
        pushed = of_reward * reward(student, teacher, spec)
        total = total + torch.where(of_reward == 0, 0.0, pushed)
    return total


def reward(student: Tensor, teacher: Tensor, spec) -> Tensor:
    """[T, v] float64 w of every column."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    q, p, ratio = log_q.exp(), log_p.exp(), log_p - log_q
    if spec.reward == "log_ratio":
        return _weighted(q, ratio)
    if spec.reward == "mixture":
        return _weighted(q, _log_mixture(log_q, log_p, spec.mix) - log_q)
    if spec.reward == "power":
        return q * (p**spec.power - q**spec.power)
    inside = torch.where(p < q, _weighted(p, ratio), _weighted(q, ratio))
    if spec.reward == "trust":
        return inside
    assert spec.reward == "trust_clip"
    floored = torch.where(ratio > spec.reward_floor, ratio, spec.reward_floor)
    return inside + torch.where(p < q, (q - p) * floored, 0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.double().cpu().log_softmax(-1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    return torch.where(weights > 0, weights * values, 0.0)


def _log_mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))
