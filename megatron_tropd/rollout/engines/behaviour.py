r"""Distributions between student and teacher that a token may be sampled from.

p = teacher, q = student, mu = what samples. Rows are next-token distributions over the whole
vocabulary as log-probs at temperature 1, in float64; -inf is a token that is never written.

Trust-region behaviour blending (TRB, arXiv 2605.31159), with r = log p - log q:

.. math::
    \mu_b = q^{1-b} p^b / Z = q \exp(b r - A(b)), \quad A(b) = \log \sum q \exp(b r)

    KL(\mu_b || q) = b A'(b) - A(b), \quad A'(b) = E_{\mu_b}[r], \quad
    \frac{d}{db} KL(\mu_b || q) = b \, Var_{\mu_b}[r] \ge 0

b* is the largest b in [0, 1] with KL(mu_b || q) <= epsilon.

Shape suffixes: N = rows, V = vocabulary, S = ids that mean the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.data.samples import Blend

TOLERANCE = 1e-6
"""Of KL(mu_b* || q) below epsilon, in nats."""
_MOST_STEPS = 200
"""Of the search for b*; halving alone needs about 50."""


@dataclass(frozen=True)
class Blended:
    """The distributions that rows are sampled from."""

    log_mu_NV: Tensor
    """[N, V] float64 log mu."""
    b_N: Tensor
    """[N] float64 share of the teacher: TRB's b*, the mixture's a, SKD's mass outside the top-k."""
    kl_N: Tensor
    """[N] float64 KL(mu || q), in nats."""


def blend(rule: Blend, log_p_NV: Tensor, log_q_NV: Tensor) -> Blended:
    """Make the distribution that ``rule`` samples from.

    Args:
        rule: which, and how far from the student.
        log_p_NV: [N, V] float64 log-probs of the teacher.
        log_q_NV: [N, V] float64 log-probs of the student.

    Returns:
        One distribution for each row.
    """
    if rule.kind == "blended":
        return trust_region(log_p_NV, log_q_NV, rule.strength)
    if rule.kind == "mixture":
        b_N = torch.full_like(log_p_NV[:, 0], rule.strength)
        b_N1 = b_N.unsqueeze(-1)
        log_mu_NV = torch.logaddexp(_log(b_N1) + log_p_NV, _log(1 - b_N1) + log_q_NV)
    else:
        log_mu_NV, b_N = teacher_outside_top_k(log_p_NV, log_q_NV, rule.top_k)
    return Blended(log_mu_NV, b_N, kl(log_mu_NV, log_q_NV))


def trust_region(log_p_NV: Tensor, log_q_NV: Tensor, epsilon: float) -> Blended:
    """TRB: as near to the teacher as KL(mu || q) <= epsilon allows.

    Tokens that one model never writes have no r. mu_b does not write them for 0 < b < 1, so

    - a row whose student lacks tokens of the teacher (KL(p || q) is infinite) ends at b = 1 with
      the teacher on the common tokens, if that is near enough;
    - a row whose teacher lacks much of the student stays at b = 0, the student.

    Args:
        log_p_NV, log_q_NV: as in :func:`blend`.
        epsilon: radius in nats; inf: the teacher itself.
    """
    if epsilon == torch.inf:
        ones_N = torch.ones_like(log_p_NV[:, 0])
        return Blended(log_p_NV, ones_N, kl(log_p_NV, log_q_NV))
    common_NV = (log_p_NV > -torch.inf) & (log_q_NV > -torch.inf)
    r_NV = torch.where(common_NV, log_p_NV - log_q_NV, 0.0)
    tilted = _Tilted(torch.where(common_NV, log_q_NV, -torch.inf), r_NV)
    b_N = _largest_b(tilted, epsilon)
    student_N1 = (b_N == 0).unsqueeze(-1)
    log_mu_NV = torch.where(student_N1, log_q_NV, tilted.log_mu(b_N))
    return Blended(log_mu_NV, b_N, torch.where(b_N == 0, 0.0, tilted.kl(b_N)[0]))


def teacher_outside_top_k(log_p_NV: Tensor, log_q_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """SKD: a token of the student that is in the teacher's top-k, else one of the teacher's.

    Returns:
        [N, V] log mu, and [N] how often the teacher is asked.
    """
    chosen = log_p_NV.topk(min(top_k, log_p_NV.shape[-1])).indices
    kept_NV = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter_(-1, chosen, True)
    asked_N = torch.where(kept_NV, 0.0, log_q_NV.exp()).sum(dim=-1)
    kept = torch.where(kept_NV, log_q_NV, -torch.inf)
    return torch.logaddexp(kept, _log(asked_N).unsqueeze(-1) + log_p_NV), asked_N


def kl(log_mu_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """[N] KL(mu || q) in nats; inf if mu writes what q never does."""
    mu_NV = log_mu_NV.exp()
    return torch.where(mu_NV > 0, mu_NV * (log_mu_NV - log_q_NV), 0.0).sum(dim=-1)


def share_stops(logprobs_NV: Tensor, stops: Sequence[int]) -> Tensor:
    """Move the probability of all ``stops`` to the first: to stop is one event.

    Args:
        logprobs_NV: [N, V].
        stops: ids that end a sample, of either model; fewer than two: nothing changes.

    Returns:
        [N, V], a copy if it differs.
    """
    if len(stops) < 2:
        return logprobs_NV
    ids_S = torch.tensor(stops, device=logprobs_NV.device)
    shared_NV = logprobs_NV.index_fill(-1, ids_S, -torch.inf)
    shared_NV[:, stops[0]] = logprobs_NV[:, ids_S].logsumexp(dim=-1)
    return shared_NV


def accepted(log_mu_NV: Tensor, log_q_NV: Tensor, drafts_N: Tensor, uniforms_N: Tensor) -> Tensor:
    """[N] bool: whether a draft x ~ q is kept, with probability min(1, mu(x) / q(x)).

    Args:
        log_mu_NV, log_q_NV: [N, V] of what is sampled from, and of what drafted.
        drafts_N: [N] int64 ids.
        uniforms_N: [N] float64 in (0, 1).

    Source: speculative sampling, arXiv 2211.17192.
    """
    drafts_N1 = drafts_N.unsqueeze(-1)
    log_ratio_N1 = log_mu_NV.gather(-1, drafts_N1) - log_q_NV.gather(-1, drafts_N1)
    return uniforms_N.log() < log_ratio_N1.squeeze(-1)


def residual(log_mu_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """[N, V] what a rejected draft is replaced from: log max(mu - q, 0), not normalised.

    A row in which nothing is left (mu = q up to round-off, so that nothing is rejected) is mu.
    """
    # log(mu - q) = log mu + log(1 - q/mu), exact also where both are tiny.
    below_NV = log_q_NV < log_mu_NV
    gap_NV = torch.where(below_NV, log_q_NV - log_mu_NV, -torch.inf)
    left_NV = torch.where(below_NV, log_mu_NV + torch.log(-torch.expm1(gap_NV)), -torch.inf)
    nothing_N1 = (left_NV == -torch.inf).all(dim=-1, keepdim=True)
    return torch.where(nothing_N1, log_mu_NV, left_NV)


@dataclass(frozen=True)
class _Tilted:
    """The family mu_b on the common tokens."""

    log_q_NV: Tensor
    r_NV: Tensor

    def log_mu(self, b_N: Tensor) -> Tensor:
        return (self.log_q_NV + b_N.unsqueeze(-1) * self.r_NV).log_softmax(dim=-1)

    def kl(self, b_N: Tensor) -> tuple[Tensor, Tensor]:
        """([N] KL(mu_b || q), [N] its derivative); inf if the models share no token."""
        tilted_NV = self.log_q_NV + b_N.unsqueeze(-1) * self.r_NV
        a_N = tilted_NV.logsumexp(dim=-1)
        mu_NV = (tilted_NV - a_N.unsqueeze(-1)).exp()
        mean_N = (mu_NV * self.r_NV).sum(dim=-1)
        apart_NV = self.r_NV - mean_N.unsqueeze(-1)
        slope_N = b_N * (mu_NV * apart_NV * apart_NV).sum(dim=-1)
        kl_N = b_N * mean_N - a_N
        return torch.where(kl_N.isnan(), torch.inf, kl_N), slope_N


def _largest_b(tilted: _Tilted, epsilon: float) -> Tensor:
    """[N] b*: Newton's steps, halving the bracket if one leaves it.

    The lower end always keeps KL <= epsilon, and is the answer.
    """
    ones_N = torch.ones_like(tilted.r_NV[:, 0])
    low_N, high_N = torch.zeros_like(ones_N), ones_N.clone()
    inside_N = (tilted.kl(ones_N)[0] <= epsilon) & (epsilon > 0)
    low_N = torch.where(inside_N, 1.0, low_N)
    kl_low_N = torch.zeros_like(ones_N)
    b_N = torch.full_like(ones_N, 0.5)
    for _ in range(_MOST_STEPS):
        open_N = ~inside_N & (epsilon - kl_low_N > TOLERANCE) & (high_N - low_N > 1e-15)
        if not open_N.any():
            break
        kl_N, slope_N = tilted.kl(b_N)
        near_N = kl_N <= epsilon
        kl_low_N = torch.where(open_N & near_N, kl_N, kl_low_N)
        low_N = torch.where(open_N & near_N, b_N, low_N)
        high_N = torch.where(open_N & ~near_N, b_N, high_N)
        newton_N = b_N - (kl_N - (epsilon - TOLERANCE / 2)) / slope_N
        usable_N = (newton_N > low_N) & (newton_N < high_N)
        b_N = torch.where(usable_N, newton_N, (low_N + high_N) / 2)
    return low_N


def _log(values: Tensor) -> Tensor:
    """Log with log 0 = -inf; round-off below 0 counts as 0."""
    return values.clamp(min=0.0).log()
