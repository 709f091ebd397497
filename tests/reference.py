"""The losses again, slowly: one token at a time, whole vocabulary, float64, torch's autograd.

Written from the formulas, sharing nothing with ``megatron_tropd.losses``.
"""

import math

import torch
from torch import Tensor


def log_softmax(logits: Tensor, vocab_size: int) -> list[Tensor]:
    """log-probabilities of the real columns of one token, as a list of float64 scalars."""
    real = [z.double() for z in logits[:vocab_size]]
    norm = torch.logsumexp(torch.stack(real), dim=0)
    return [z - norm for z in real]


def top_k_ids(logits: Tensor, k: int, vocab_size: int) -> list[int]:
    """Ids of the k largest logits of one token, largest first, ties to the lower id."""
    return sorted(range(vocab_size), key=lambda v: (-float(logits[v]), v))[:k]


def token(
    student: Tensor,
    teacher: Tensor,
    x: int,
    *,
    is_teacher: bool,
    u: float,
    region: str,
    outlier: str,
    top_k: int,
    tau: float | None,
    beta: float,
    vocab_size: int,
) -> tuple[Tensor, dict[str, float]]:
    """One token.

    Args:
        student: [V'] logits, the gradient is wanted for these.
        teacher: [V'] logits.
        x: the token.
        is_teacher: the teacher wrote it.
        u: the uniform number of the mask.
        region, outlier, top_k, tau: as in ``LossConfig``.
        beta: weight of teacher tokens.
        vocab_size: real columns.

    Returns:
        (scalar whose gradient is that of the loss, the values ``LossOutput.values`` should hold)
    """
    log_q = log_softmax(student, vocab_size)
    log_p = [float(v) for v in log_softmax(teacher.detach(), vocab_size)]
    p = [math.exp(v) for v in log_p]
    log_q_values = [float(v.detach()) for v in log_q]
    q = [math.exp(v) for v in log_q_values]
    ids = top_k_ids(teacher, top_k, vocab_size)
    advantage = log_p[x] - log_q_values[x]
    trust = 1.0 if p[x] >= q[x] else p[x] / q[x]

    if region == "none":
        inside = True
    elif region == "threshold":
        inside = advantage > tau
    else:
        inside = u < trust

    if is_teacher:
        surrogate = -beta * log_q[x]
        value = float(surrogate.detach())
    elif inside:
        surrogate, value = -advantage * log_q[x], -advantage
    elif outlier == "forward_kl":
        surrogate = log_q[x] * 0.0
        for v in ids:
            if p[v] > 0:
                surrogate = surrogate + p[v] * (log_p[v] - log_q[v])
        value = float(surrogate.detach())
    elif outlier == "clip":
        surrogate, value = -max(advantage, tau) * log_q[x], -max(advantage, tau)
    else:
        surrogate, value = log_q[x] * 0.0, 0.0

    def expect(weights, terms):
        return sum(w * t for w, t in zip(weights, terms, strict=True) if w > 0)

    values = {
        "student_logprob": log_q_values[x],
        "teacher_logprob": log_p[x],
        "trust": trust,
        "outlier": float(not inside and not is_teacher),
        "term": value,
        "k1": -advantage,
        "tv": 1.0 - sum(min(a, b) for a, b in zip(p, q, strict=True)),
        "reverse_kl": expect(q, [b - a for a, b in zip(log_p, log_q_values, strict=True)]),
        "forward_kl": expect(p, [a - b for a, b in zip(log_p, log_q_values, strict=True)]),
        "student_entropy": -expect(q, log_q_values),
        "teacher_entropy": -expect(p, log_p),
        "topk_mass_teacher": sum(p[v] for v in ids),
        "topk_mass_student": sum(q[v] for v in ids),
    }
    return surrogate, values


def losses(student: Tensor, teacher: Tensor, ids, is_teacher, uniforms, weights, **settings):
    """Many tokens.

    Args:
        student, teacher: [T, V'] logits.
        ids, is_teacher, uniforms: [T] each.
        weights: (teacher, student) segment weights.
        settings: as for :func:`token`.

    Returns:
        ([T] float64 weighted terms, [T, V'] float64 gradient of ``sum_t (t + 1) * loss_t``,
        dict of [T] float64 values). The factor t + 1 shows mixed-up rows.
    """
    leaf = student.detach().double().requires_grad_()
    surrogates, rows = [], []
    for t in range(len(ids)):
        surrogate, values = token(
            leaf[t],
            teacher[t].double(),
            int(ids[t]),
            is_teacher=bool(is_teacher[t]),
            u=float(uniforms[t]),
            **settings,
        )
        weight = weights[0] if is_teacher[t] else weights[1]
        surrogates.append((t + 1) * weight * surrogate)
        rows.append(values | {"loss": weight * values["term"]})
    if not rows:
        return torch.zeros(0).double(), torch.zeros_like(leaf), {}
    torch.stack(surrogates).sum().backward()
    table = {name: torch.tensor([row[name] for row in rows]).double() for name in rows[0]}
    return table.pop("loss"), leaf.grad, table
