r"""The terms of every method: one token's value and the coefficients of its gradient.

Every loss here has the gradient of :math:`\sum_v c_v \log q(v)` with constant c, where

.. math:: c_v = s \, 1[v = x] + k_v \, 1[v \in \mathrm{TopK}(p)] + a \, w_v + f \, p_v

so a method is the four coefficients of :class:`Term` and the value it reports. p = teacher,
q = student, x = the token, r = log p - log q, m = min(p/q, 1). Terms with a stop-gradient report
the value without the factor log q(x), so that their mean estimates a divergence.

Shape suffixes: T = tokens, K = top-k. Sources: docs/losses.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tropd.config.loss import LossConfig
from megatron_tropd.losses.dense import DenseSpec, Reward, sum_names
from megatron_tropd.losses.signals import needed_sums
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
        return total_T + _times(self.reward_T, reward_sum_T)

    def scaled(self, factor_T: Tensor) -> "Term":
        """Value and gradient times a factor; a factor of 0 silences nan and infinities too."""
        return replace(
            self,
            value_T=_times(factor_T, self.value_T),
            sampled_T=_times(factor_T, self.sampled_T),
            topk_TK=_times(factor_T.unsqueeze(-1), self.topk_TK),
            reward_T=_times(factor_T, self.reward_T),
            teacher_T=_times(factor_T, self.teacher_T),
        )

    def rows(self, rows: slice) -> "Term":
        """The same of some tokens."""
        return Term(*(value[rows] for value in vars(self).values()))


def dense_spec(config: LossConfig, *, metrics: bool, full: bool) -> DenseSpec:
    """The passes over the vocabulary that a loss needs.

    Args:
        config: the loss.
        metrics: whether the sums that describe the pair are wanted as well.
        full: whether the teacher's logits are at hand.

    Returns:
        The specification; no sums without the teacher's logits.
    """
    wanted = needed_sums(config) + (METRICS if metrics else ())
    is_exact = config.objective == "policy_gradient" and config.region == "exact"
    uses_whole_p = config.objective == "forward_kl" or (
        config.uses_forward_kl and config.top_k == 0 and config.gradient == "backprop"
    )
    reward: Reward | None = None
    if is_exact:
        reward = "trust_clip" if config.outlier == "clip" else "trust"
    elif config.objective in ("reverse_kl", "jsd"):
        reward = "log_ratio" if config.objective == "reverse_kl" else "mixture"
    return DenseSpec(
        sums=sum_names(wanted) if full else (),
        reward=reward,
        tau=config.reward_floor or 0.0,
        mix=config.jsd_beta,
        teacher=uses_whole_p,
    )


def term_of_tokens(
    statistics: TokenStatistics, targets: LossTargets, config: LossConfig, beta: float
) -> Term:
    """The whole loss of every token, weights included.

    Args:
        statistics: of the T tokens.
        targets: the same tokens.
        config: which loss.
        beta: weight of teacher tokens.

    Returns:
        One term.
    """
    if config.objective == "policy_gradient":
        student = policy_gradient(statistics, targets, config)
    else:
        student = DIVERGENCES[config.objective](statistics, config)
    if config.teacher_tokens == "same":
        return student
    return _choose(targets.is_teacher_T, teacher_token(statistics, config, beta), student)


def teacher_token(statistics: TokenStatistics, config: LossConfig, beta: float) -> Term:
    r""":math:`-\beta \log q(x)`: the sampled forward KL up to a constant (guidance).

    With ``score_function`` the reward is :math:`\beta (\log q(x) - \log p(x))`: the wrong sign, as
    said of the authors' code.
    """
    if config.gradient == "score_function":
        value_T = beta * statistics.log_ratio_T
        return _term(statistics, value_T=value_T, sampled_T=value_T)
    value_T = -beta * statistics.student_logprob_T
    return _term(statistics, value_T=value_T, sampled_T=torch.full_like(value_T, -beta))


def policy_gradient(statistics: TokenStatistics, targets: LossTargets, config: LossConfig) -> Term:
    """Reward of the sampled token inside the trust region, the outlier rule outside."""
    if config.region == "exact":
        return exact_trust_region(statistics, config)
    trusted_T = _trusted(statistics.log_ratio_T, targets.uniforms_T, config)
    outlier_T = 1.0 - trusted_T
    earned_T, infinite_T = _earned(statistics, targets, trusted_T, config)
    if config.uses_forward_kl and config.gradient == "score_function":
        earned_T = earned_T - _times(outlier_T, _forward_kl(statistics, config))
    term = _term(statistics, value_T=-earned_T, sampled_T=-earned_T)
    term = replace(term, dropped_T=infinite_T)
    rho_T = _importance(statistics, targets, config)
    if config.importance == "ppo":
        term = _ppo_clipped(term, earned_T, rho_T, config)
    # The divergences are no rewards: PPO clips none of them, a weight of the token applies to all.
    if config.uses_forward_kl and config.gradient == "backprop":
        term = _add(term, forward_kl_outlier(statistics, config, outlier_T))
    if config.entropy_forward_kl is not None:
        term = _add(term, entropy_forward_kl(statistics, config))
    if config.importance in ("truncated", "band"):
        term = _weighted_by_importance(term, rho_T, config)
    return replace(term, outlier_T=outlier_T, importance_T=rho_T)


def _earned(
    statistics: TokenStatistics, targets: LossTargets, trusted_T: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """([T] reward inside the region and of clipped outliers, [T] bool whether it is infinite).

    An infinite reward, or one of a token that neither model writes, counts as 0.
    """
    ratio_T = statistics.log_ratio_T
    reward_T = rewards(ratio_T, config) if targets.rewards_T is None else targets.rewards_T
    earned_T = _times(trusted_T, reward_T)
    if config.outlier == "clip" and config.region != "none":
        clipped_T = reward_T.clamp(min=config.reward_floor)
        earned_T = earned_T + _times(1.0 - trusted_T, clipped_T)
    unwritten_T = statistics.teacher_logprob_T.isinf() & statistics.student_logprob_T.isinf()
    infinite_T = earned_T.isinf() | unwritten_T
    return torch.where(infinite_T, 0.0, earned_T), infinite_T


def rewards(log_ratio_T: Tensor, config: LossConfig) -> Tensor:
    """Reward of a sampled token: log p/q, or the proximal teacher's log(a p/q + 1 - a).

    Args:
        log_ratio_T: [T] log p(x) - log q(x).
        config: which.

    Returns:
        [T] nats.
    """
    if config.reward == "log_ratio":
        return log_ratio_T
    share = config.proximal_alpha
    # The first is exactly 0 where p = q, the second does not overflow where p is much larger.
    small_T = torch.log1p(share * torch.expm1(log_ratio_T.clamp(max=20.0)))
    large_T = log_ratio_T + torch.log(share + (1 - share) * torch.exp(-log_ratio_T))
    return torch.where(log_ratio_T < 20, small_T, large_T)


def forward_kl_outlier(statistics: TokenStatistics, config: LossConfig, outlier_T: Tensor) -> Term:
    r""":math:`o \sum_{v \in \mathrm{TopK}(p)} p (\log p - \log q)`, not renormalised."""
    value_T = _forward_kl(statistics, config)
    if config.top_k == 0:
        term = _term(statistics, value_T=value_T, teacher_T=torch.full_like(value_T, -1.0))
    else:
        p_TK = statistics.topk_teacher_logprobs_TK.exp()
        term = _term(statistics, value_T=value_T, topk_TK=-p_TK)
    return term.scaled(outlier_T)


def exact_trust_region(statistics: TokenStatistics, config: LossConfig) -> Term:
    r"""TrOPD's expectation over x ~ q and the draw, in closed form.

    .. math:: -\sum_v \mathrm{sg}(\min(p, q) r) \log q + \mathrm{sg}(TV) \, F

    with F the outlier's forward KL; for clip the sum also has (q - min(p, q)) max(r, tau).
    """
    tv_T = statistics.sum_of("tv")
    reward_sum_T = statistics.sum_of("reward")
    term = _term(statistics, value_T=-reward_sum_T, reward_T=torch.full_like(tv_T, -1.0))
    if config.outlier == "forward_kl":
        term = _add(term, forward_kl_outlier(statistics, config, tv_T))
    return replace(term, outlier_T=tv_T)


def entropy_forward_kl(statistics: TokenStatistics, config: LossConfig) -> Term:
    """EOPD: forward KL on the top-k, the teacher renormalised there, where its entropy is high."""
    log_p_TK = statistics.topk_teacher_logprobs_TK.log_softmax(dim=-1)
    p_TK = log_p_TK.exp()
    value_T = _times(p_TK, log_p_TK - statistics.topk_student_logprobs_TK).sum(dim=-1)
    assert config.entropy_forward_kl is not None
    uncertain_T = statistics.sum_of("teacher_entropy") > config.entropy_forward_kl
    return _term(statistics, value_T=value_T, topk_TK=-p_TK).scaled(uncertain_T.float())


def forward_kl(statistics: TokenStatistics, config: LossConfig) -> Term:
    """KL(p || q) over the whole vocabulary."""
    value_T = statistics.sum_of("forward_kl")
    return _term(statistics, value_T=value_T, teacher_T=torch.full_like(value_T, -1.0))


def reverse_kl(statistics: TokenStatistics, config: LossConfig) -> Term:
    """KL(q || p) over the whole vocabulary; its gradient is that of -sum sg(q r) log q."""
    value_T = statistics.sum_of("reverse_kl")
    return _term(statistics, value_T=value_T, reward_T=torch.full_like(value_T, -1.0))


def jsd(statistics: TokenStatistics, config: LossConfig) -> Term:
    r""":math:`b KL(p||m) + (1-b) KL(q||m)`, m = b p + (1-b) q.

    dJSD/dq = (1-b) log(q/m), so the gradient is a policy gradient with the reward
    (1-b) log(b p/q + 1-b): up to a factor that of the proximal teacher.
    """
    share = config.jsd_beta
    value_T = share * statistics.sum_of("teacher_to_mixture")
    value_T = value_T - (1 - share) * statistics.sum_of("reward")
    return _term(statistics, value_T=value_T, reward_T=torch.full_like(value_T, share - 1))


def local_support(statistics: TokenStatistics, config: LossConfig) -> Term:
    """KL(q || p) with both renormalised on the teacher's top-k, back-propagated."""
    log_q_TK = statistics.topk_student_logprobs_TK.log_softmax(dim=-1)
    log_p_TK = statistics.topk_teacher_logprobs_TK.log_softmax(dim=-1)
    q_TK = log_q_TK.exp()
    ratio_TK = log_q_TK - log_p_TK
    value_T = _times(q_TK, ratio_TK).sum(dim=-1)
    return _term(
        statistics,
        value_T=value_T,
        topk_TK=_times(q_TK, ratio_TK - value_T.unsqueeze(-1)),
    )


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "local_support": local_support,
}


def trust(log_ratio_T: Tensor) -> Tensor:
    """[T] min(p/q, 1): the acceptance probability of speculative decoding."""
    return log_ratio_T.clamp(max=0.0).exp()


def _trusted(log_ratio_T: Tensor, uniforms_T: Tensor, config: LossConfig) -> Tensor:
    """[T] float share of the token inside the region: drawn, or its mean."""
    if config.region == "none":
        return torch.ones_like(log_ratio_T)
    # Negated below, so that nan is trusted and reaches the loss instead of hiding in a mask.
    if config.region == "threshold":
        floor = config.reward_floor
        assert floor is not None
        outside_T = log_ratio_T < floor if config.trusts_the_floor else log_ratio_T <= floor
        return (~outside_T).float()
    trust_T = trust(log_ratio_T)
    if config.region == "expected":
        return trust_T
    # A draw of almost 1 that float32 rounds to 1 excludes no token of trust 1.
    trusted_T = (~((uniforms_T >= trust_T) & (trust_T < 1))).float()
    return torch.where(uniforms_T.isnan(), torch.nan, trusted_T)  # see ``checks``


def _forward_kl(statistics: TokenStatistics, config: LossConfig) -> Tensor:
    if config.top_k == 0:
        return statistics.sum_of("forward_kl")
    log_p_TK = statistics.topk_teacher_logprobs_TK
    ratio_TK = log_p_TK - statistics.topk_student_logprobs_TK
    return _times(log_p_TK.exp(), ratio_TK).sum(dim=-1)


def _importance(statistics: TokenStatistics, targets: LossTargets, config: LossConfig) -> Tensor:
    """[T] rho = q(x) / (probability that sampled x); 1 where it is not asked for."""
    if config.importance == "none" or targets.rollout_logprobs_T is None:
        return torch.ones_like(statistics.student_logprob_T)
    return (statistics.student_logprob_T - targets.rollout_logprobs_T).exp()


def _ppo_clipped(term: Term, reward_T: Tensor, rho_T: Tensor, config: LossConfig) -> Term:
    low, high = config.importance_low, config.importance_high
    clipped_T = ((reward_T > 0) & (rho_T > high)) | ((reward_T < 0) & (rho_T < low))
    objective_T = torch.minimum(_times(reward_T, rho_T), _times(reward_T, rho_T.clamp(low, high)))
    return replace(
        term,
        value_T=-objective_T,
        sampled_T=torch.where(clipped_T, 0.0, -_times(reward_T, rho_T)),
        dropped_T=term.dropped_T | clipped_T,
    )


def _weighted_by_importance(term: Term, rho_T: Tensor, config: LossConfig) -> Term:
    if config.importance == "truncated":
        return term.scaled(rho_T.clamp(max=config.importance_high))
    # Not "inside": nan is neither below nor above and has to reach the loss.
    outside_T = (rho_T < config.importance_low) | (rho_T > config.importance_high)
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
    moved_T = (second.topk_TK != 0).any(dim=-1) | (second.teacher_T != 0)
    return replace(
        first,
        value_T=first.value_T + second.value_T,
        sampled_T=first.sampled_T + second.sampled_T,
        topk_TK=first.topk_TK + second.topk_TK,
        reward_T=first.reward_T + second.reward_T,
        teacher_T=first.teacher_T + second.teacher_T,
        dropped_T=first.dropped_T & ~moved_T,
    )


def _choose(condition_T: Tensor, first: Term, second: Term) -> Term:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition_T if a.dim() == 1 else condition_T.unsqueeze(-1), a, b)

    return Term(
        *(pick(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    )


def _times(factor: Tensor, values: Tensor) -> Tensor:
    """Product in which 0 x inf = 0."""
    return torch.where(factor == 0, 0.0, factor * values)
