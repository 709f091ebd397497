r"""The terms of every method: one token's value and the coefficients of its gradient.

Every loss here has the gradient of :math:`\sum_v c_v \log q(v)` with constant c, where

.. math:: c_v = s \, 1[v = x] + k_v \, 1[v \in \mathrm{TopK}(p)] + a \, w_v + f \, p_v

so a method (``losses/methods``) is the four coefficients of :class:`Term` and the value it
reports. p = teacher, q = student, x = the token, r = log p - log q, m = min(p/q, 1). Terms with a
stop-gradient report the value without the factor log q(x), so that their mean estimates a
divergence.

Shape suffixes: T = tokens, K = top-k. Sources: docs/losses.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tropd.config.loss import Needs
from megatron_tropd.losses.dense import DenseSpec, sum_names
from megatron_tropd.losses.statistics import METRICS, TokenStatistics
from megatron_tropd.losses.targets import LossTargets


@dataclass(frozen=True)
class Term:
    """Value and gradient of one term at every token."""

    value_T: Tensor
    """[T] what the term reports."""
    sampled_T: Tensor
    """[T] s: multiplies log q(x)."""
    topk_TK: Tensor
    """[T, K] k: multiplies log q of the teacher's top-k."""
    reward_T: Tensor
    """[T] a: multiplies the sum of w_v log q(v) (``DenseSpec.reward`` says which w)."""
    teacher_T: Tensor
    """[T] f: multiplies the sum of p_v log q(v)."""
    outlier_T: Tensor
    """[T] how much of the token lies outside the trust region."""
    importance_T: Tensor
    """[T] rho."""
    dropped_T: Tensor
    """[T] bool: the token has no gradient for a reason of its own."""

    def mass(self, statistics: TokenStatistics, spec: DenseSpec) -> Tensor:
        """[T] the sum of c_v over the vocabulary."""
        total_T = self.sampled_T + self.topk_TK.sum(dim=-1) + self.teacher_T
        if spec.reward is None:
            return total_T
        reward_sum_T = (
            -statistics.sum_of("reverse_kl")
            if spec.reward == "log_ratio"
            else statistics.sum_of("reward")
        )
        return total_T + times(self.reward_T, reward_sum_T)

    def scaled(self, factor_T: Tensor) -> "Term":
        """Value and gradient times a factor; a factor of 0 silences nan and infinities too."""
        return replace(
            self,
            value_T=times(factor_T, self.value_T),
            sampled_T=times(factor_T, self.sampled_T),
            topk_TK=times(factor_T.unsqueeze(-1), self.topk_TK),
            reward_T=times(factor_T, self.reward_T),
            teacher_T=times(factor_T, self.teacher_T),
        )

    def rows(self, rows: slice) -> "Term":
        """The same of some tokens."""
        return Term(*(value[rows] for value in vars(self).values()))


def dense_spec(needs: Needs, *, metrics: bool, full: bool) -> DenseSpec:
    """The passes over the vocabulary that a loss needs.

    Args:
        needs: of the loss.
        metrics: whether the sums that describe the pair are wanted as well.
        full: whether the teacher's logits are at hand.

    Returns:
        The specification; no sums without the teacher's logits.
    """
    return DenseSpec(
        sums=sum_names(needs.sums + (METRICS if metrics else ())) if full else (),
        reward=needs.reward,
        reward_floor=needs.reward_floor,
        mix=needs.mix,
        power=needs.power,
        teacher=needs.teacher_gradient,
    )


def teacher_token(statistics: TokenStatistics, beta: float, *, by_score: bool = False) -> Term:
    r""":math:`-\beta \log q(x)`: the sampled forward KL up to a constant (guidance).

    By score function the reward is :math:`\beta (\log q(x) - \log p(x))`: the wrong sign, as
    said of the authors' code.
    """
    if by_score:
        value_T = beta * statistics.log_ratio_T
        return _term(statistics, value_T=value_T, sampled_T=value_T)
    value_T = -beta * statistics.student_logprob_T
    return _term(statistics, value_T=value_T, sampled_T=torch.full_like(value_T, -beta))


def policy_gradient(
    statistics: TokenStatistics,
    targets: LossTargets,
    earned: tuple[Tensor, Tensor],
    *,
    importance: tuple[str, float, float],
    outlier_T: Tensor | None,
    divergence: Term | None,
) -> Term:
    """Reward x log q of the sampled token, and a divergence beside it.

    Args:
        statistics: of the T tokens.
        targets: the same tokens.
        earned: [T] reward and [T] bool whether it was infinite (:func:`earned`).
        importance: how rho enters, and its interval.
        outlier_T: [T] how much of the token lies outside of the trust region; None: nothing.
        divergence: added to the reward's term.
    """
    earned_T, infinite_T = earned
    term = _term(statistics, value_T=-earned_T, sampled_T=-earned_T)
    term = replace(term, dropped_T=infinite_T)
    how, low, high = importance
    rho_T = _importance(statistics, targets, how)
    if how == "ppo":
        term = _ppo_clipped(term, earned_T, rho_T, low, high)
    # The divergences are no rewards: PPO clips none of them, a weight of the token applies to all.
    if divergence is not None:
        term = _add(term, divergence)
    if how in ("truncated", "band"):
        term = _weighted_by_importance(term, rho_T, how, low, high)
    outlier_T = torch.zeros_like(rho_T) if outlier_T is None else outlier_T
    return replace(term, outlier_T=outlier_T, importance_T=rho_T)


def earned(
    statistics: TokenStatistics,
    targets: LossTargets,
    reward_T: Tensor,
    trusted_T: Tensor | None = None,
    clip_at: float | None = None,
) -> tuple[Tensor, Tensor]:
    """([T] reward inside the region and of clipped outliers, [T] bool whether it is infinite).

    An infinite reward, or one of a token that neither model writes, counts as 0.

    Args:
        statistics: of the T tokens.
        targets: the same tokens; their rewards, if given, stand in place of ``reward_T``.
        reward_T: [T] nats.
        trusted_T: [T] share of the token inside the trust region; None: all.
        clip_at: floor of the outliers' reward; None: they get none.
    """
    earned_T = reward_T = reward_T if targets.rewards_T is None else targets.rewards_T
    if trusted_T is not None:
        earned_T = times(trusted_T, reward_T)
        if clip_at is not None:
            earned_T = earned_T + times(1.0 - trusted_T, reward_T.clamp(min=clip_at))
    unwritten_T = statistics.teacher_logprob_T.isinf() & statistics.student_logprob_T.isinf()
    infinite_T = earned_T.isinf() | unwritten_T
    return torch.where(infinite_T, 0.0, earned_T), infinite_T


def proximal_reward(log_ratio_T: Tensor, share: float) -> Tensor:
    """Reward of a sampled token under the proximal teacher: log(a p/q + 1 - a).

    Args:
        log_ratio_T: [T] log p(x) - log q(x).
        share: a in (0, 1]; 1: the log-ratio itself.

    Returns:
        [T] nats.
    """
    if share == 1:
        return log_ratio_T
    # The first is exactly 0 where p = q, the second does not overflow where p is much larger.
    small_T = torch.log1p(share * torch.expm1(log_ratio_T.clamp(max=20.0)))
    large_T = log_ratio_T + torch.log(share + (1 - share) * torch.exp(-log_ratio_T))
    return torch.where(log_ratio_T < 20, small_T, large_T)


def power_reward(statistics: TokenStatistics, power: float) -> Tensor:
    """[T] p(x)^a - q(x)^a, between -1 and 1.

    Args:
        statistics: of the T tokens.
        power: a.
    """
    return (power * statistics.teacher_logprob_T).exp() - (
        power * statistics.student_logprob_T
    ).exp()


def expected_reward(statistics: TokenStatistics) -> Term:
    """The policy gradient of the dense reward w, its mean over x ~ q in closed form."""
    value_T = -statistics.sum_of("reward")
    return _term(statistics, value_T=value_T, reward_T=torch.full_like(value_T, -1.0))


def forward_kl_outlier(statistics: TokenStatistics, top_k: int, outlier_T: Tensor) -> Term:
    r""":math:`o \sum_{v \in \mathrm{TopK}(p)} p (\log p - \log q)`, not renormalised."""
    value_T = outlier_divergence(statistics, top_k)
    if top_k == 0:
        term = _term(statistics, value_T=value_T, teacher_T=torch.full_like(value_T, -1.0))
    else:
        p_TK = statistics.topk_teacher_logprobs_TK.exp()
        term = _term(statistics, value_T=value_T, topk_TK=-p_TK)
    return term.scaled(outlier_T)


def exact_trust_region(statistics: TokenStatistics, top_k: int | None) -> Term:
    r"""TrOPD's expectation over x ~ q and the draw, in closed form.

    .. math:: -\sum_v \mathrm{sg}(\min(p, q) r) \log q + \mathrm{sg}(TV) \, F

    with F the outlier's forward KL on ``top_k`` tokens (None: no F); for clip the sum also has
    (q - min(p, q)) max(r, tau).
    """
    tv_T = statistics.sum_of("tv")
    reward_sum_T = statistics.sum_of("reward")
    term = _term(statistics, value_T=-reward_sum_T, reward_T=torch.full_like(tv_T, -1.0))
    if top_k is not None:
        term = _add(term, forward_kl_outlier(statistics, top_k, tv_T))
    return replace(term, outlier_T=tv_T)


def entropy_forward_kl(statistics: TokenStatistics, nats: float) -> Term:
    """EOPD: forward KL on the top-k, the teacher renormalised there, where its entropy is high."""
    log_p_TK = statistics.topk_teacher_logprobs_TK.log_softmax(dim=-1)
    p_TK = log_p_TK.exp()
    value_T = times(p_TK, log_p_TK - statistics.topk_student_logprobs_TK).sum(dim=-1)
    uncertain_T = statistics.sum_of("teacher_entropy") > nats
    return _term(statistics, value_T=value_T, topk_TK=-p_TK).scaled(uncertain_T.float())


def forward_kl(statistics: TokenStatistics) -> Term:
    """KL(p || q) over the whole vocabulary."""
    value_T = statistics.sum_of("forward_kl")
    return _term(statistics, value_T=value_T, teacher_T=torch.full_like(value_T, -1.0))


def reverse_kl(statistics: TokenStatistics) -> Term:
    """KL(q || p) over the whole vocabulary; its gradient is that of -sum sg(q r) log q."""
    value_T = statistics.sum_of("reverse_kl")
    return _term(statistics, value_T=value_T, reward_T=torch.full_like(value_T, -1.0))


def tilted_kl(statistics: TokenStatistics) -> Term:
    r"""-E_q[a log p + b log p_ref + (c - 1) log q] over the whole vocabulary (``Needs.target``).

    That is KL(q || target) - log Z, Z the sum of p^a p_ref^b q^c. Z moves no gradient: it is the
    same for every token that could have been sampled.
    """
    term = reverse_kl(statistics)
    return replace(term, value_T=term.value_T - statistics.log_mass_T)


def ratio_fit(statistics: TokenStatistics, targets: LossTargets, scale: float) -> Term:
    """(b (log q(x) - log p(x)) - A)^2 with the gradient of the square; A = ``rewards_T``."""
    assert targets.rewards_T is not None, "checked with the other inputs"
    error_T = -scale * statistics.log_ratio_T - targets.rewards_T
    return _term(statistics, value_T=error_T.square(), sampled_T=2 * scale * error_T)


def jsd(statistics: TokenStatistics, share: float) -> Term:
    r""":math:`b KL(p||m) + (1-b) KL(q||m)`, m = b p + (1-b) q.

    dJSD/dq = (1-b) log(q/m), so the gradient is a policy gradient with the reward
    (1-b) log(b p/q + 1-b): up to a factor that of the proximal teacher.
    """
    value_T = share * statistics.sum_of("teacher_to_mixture")
    value_T = value_T - (1 - share) * statistics.sum_of("reward")
    return _term(statistics, value_T=value_T, reward_T=torch.full_like(value_T, share - 1))


def local_support(statistics: TokenStatistics, *, renormalise: bool = True) -> Term:
    r"""KL(q || p) on the top-k alone, back-propagated.

    Either both are renormalised there, or the sum is

    .. math:: \sum_{v \in S} q (\log q - \log p) - q + p

    which is KL if S is everything, at least 0, and 0 with no gradient only if q = p on S.
    """
    log_q_TK = statistics.topk_student_logprobs_TK
    log_p_TK = statistics.topk_teacher_logprobs_TK
    if renormalise:
        log_q_TK, log_p_TK = log_q_TK.log_softmax(dim=-1), log_p_TK.log_softmax(dim=-1)
    q_TK = log_q_TK.exp()
    ratio_TK = log_q_TK - log_p_TK
    value_T = times(q_TK, ratio_TK).sum(dim=-1)
    if renormalise:
        ratio_TK = ratio_TK - value_T.unsqueeze(-1)
    else:
        value_T = value_T + (log_p_TK.exp() - q_TK).sum(dim=-1)
    return _term(statistics, value_T=value_T, topk_TK=times(q_TK, ratio_TK))


def trust(log_ratio_T: Tensor) -> Tensor:
    """[T] min(p/q, 1): the acceptance probability of speculative decoding."""
    return log_ratio_T.clamp(max=0.0).exp()


def drawn(log_ratio_T: Tensor, uniforms_T: Tensor) -> Tensor:
    """[T] float, 1 for tokens that the draw trusts: M ~ Bernoulli(min(p/q, 1))."""
    trust_T = trust(log_ratio_T)
    # A draw of almost 1 that float32 rounds to 1 excludes no token of trust 1. Negated, so that
    # nan is trusted and reaches the loss instead of hiding in a mask.
    trusted_T = (~((uniforms_T >= trust_T) & (trust_T < 1))).float()
    return torch.where(uniforms_T.isnan(), torch.nan, trusted_T)  # see ``checks``


def above(log_ratio_T: Tensor, floor: float, *, keeps_floor: bool) -> Tensor:
    """[T] float, 1 for tokens whose log-ratio is above the floor, or exactly it if that is kept."""
    outside_T = log_ratio_T < floor if keeps_floor else log_ratio_T <= floor
    return (~outside_T).float()  # nan is trusted, as in ``drawn``


def outlier_divergence(statistics: TokenStatistics, top_k: int) -> Tensor:
    """[T] forward KL on the teacher's top-k, not renormalised; 0: on the whole vocabulary."""
    if top_k == 0:
        return statistics.sum_of("forward_kl")
    log_p_TK = statistics.topk_teacher_logprobs_TK
    ratio_TK = log_p_TK - statistics.topk_student_logprobs_TK
    return times(log_p_TK.exp(), ratio_TK).sum(dim=-1)


def _importance(statistics: TokenStatistics, targets: LossTargets, how: str) -> Tensor:
    """[T] rho = q(x) / (probability that sampled x); 1 if it is not asked for."""
    if how == "none" or targets.rollout_logprobs_T is None:
        return torch.ones_like(statistics.student_logprob_T)
    logprob_T = statistics.student_logprob_T + statistics.sampled_share_T
    return (logprob_T - targets.rollout_logprobs_T).exp()


def _ppo_clipped(term: Term, reward_T: Tensor, rho_T: Tensor, low: float, high: float) -> Term:
    clipped_T = ((reward_T > 0) & (rho_T > high)) | ((reward_T < 0) & (rho_T < low))
    objective_T = torch.minimum(times(reward_T, rho_T), times(reward_T, rho_T.clamp(low, high)))
    return replace(
        term,
        value_T=-objective_T,
        sampled_T=torch.where(clipped_T, 0.0, -times(reward_T, rho_T)),
        dropped_T=term.dropped_T | clipped_T,
    )


def _weighted_by_importance(term: Term, rho_T: Tensor, how: str, low: float, high: float) -> Term:
    if how == "truncated":
        return term.scaled(rho_T.clamp(max=high))
    # Not "inside": nan is neither below nor above and has to reach the loss.
    outside_T = (rho_T < low) | (rho_T > high)
    term = replace(term, dropped_T=term.dropped_T | outside_T)
    return term.scaled(torch.where(outside_T, 0.0, rho_T))


def _term(
    statistics: TokenStatistics,
    *,
    value_T: Tensor,
    sampled_T: Tensor | None = None,
    topk_TK: Tensor | None = None,
    reward_T: Tensor | None = None,
    teacher_T: Tensor | None = None,
) -> Term:
    zeros_T = torch.zeros_like(value_T)

    def given(tensor: Tensor | None) -> Tensor:
        return zeros_T if tensor is None else tensor

    return Term(
        value_T=value_T,
        sampled_T=given(sampled_T),
        topk_TK=(
            torch.zeros_like(statistics.topk_student_logprobs_TK) if topk_TK is None else topk_TK
        ),
        reward_T=given(reward_T),
        teacher_T=given(teacher_T),
        outlier_T=zeros_T,
        importance_T=torch.ones_like(value_T),
        dropped_T=torch.zeros_like(value_T, dtype=torch.bool),
    )


def _add(first: Term, second: Term) -> Term:
    """A term and a divergence; what the first says about the token stays.

    A token that the divergence moves is not dropped, whatever became of its reward.
    """
    moved_T = (second.topk_TK != 0).any(dim=-1) | (second.teacher_T != 0) | (second.reward_T != 0)
    return replace(
        first,
        value_T=first.value_T + second.value_T,
        sampled_T=first.sampled_T + second.sampled_T,
        topk_TK=first.topk_TK + second.topk_TK,
        reward_T=first.reward_T + second.reward_T,
        teacher_T=first.teacher_T + second.teacher_T,
        dropped_T=first.dropped_T & ~moved_T,
    )


def where(condition_T: Tensor, first: Term, second: Term) -> Term:
    """The first term of tokens with the condition, the second of the others."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition_T if a.dim() == 1 else condition_T.unsqueeze(-1), a, b)

    return Term(
        *(pick(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    )


def times(factor: Tensor, values: Tensor) -> Tensor:
    """Product in which 0 x inf = 0."""
    return torch.where(factor == 0, 0.0, factor * values)
