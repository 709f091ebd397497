"""The losses again: whole vocabulary, no shards, no chunks, float64, torch's autograd.

Written from the formulas, sharing nothing with ``megatron_tropd``. A term with a stop-gradient has
a *surrogate*, whose gradient is wanted, and a value, which is reported; for the other terms they
are the same. Settings are plain keywords with the names and defaults of ``config.loss_of_0_1``.

Shape suffixes: T = tokens, V = vocabulary, K = top-k. p = teacher, q = student, x = the token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULTS = dict(
    objective="policy_gradient",
    reward="log_ratio",
    region="bernoulli",
    outlier="forward_kl",
    top_k=64,
    tau=None,
    floor=None,
    floor_rule="log(l)/(1-l)",
    gradient="backprop",
    jsd_beta=0.5,
    proximal_alpha=0.1,
    entropy_forward_kl=None,
    importance="none",
    importance_low=0.5,
    importance_high=2.0,
    teacher_tokens="nll",
    method=None,
    support="teacher",
    renormalise=True,
    power=5.0,
    student_power=0.0,
    decay_steps=0,
    advantage=-1.0,
)
LIKE = {
    "trb": dict(objective="local_support", support="student", renormalise=False),
    "iw_opd": dict(region="none"),
    "opsa": dict(region="none", reward="fixed"),
    "veto": dict(student_power=0.8),
    "power_opd": dict(region="none", reward="power"),
    "power_opd_exact": dict(objective="power"),
}
"""Method that version 0.1 did not have -> which parts of this file it is made of."""
UNDERFLOW = 1e-45
"""What float32 cannot tell from 0; it must not count as a use of the reward."""
BATCH_WIDE = ("select", "select_share", "switch_step", "future", "group_normalise", "denominator")
"""Settings that the caller of the losses acts on."""


@dataclass
class Tokens:
    """What is known of each token; as ``LossTargets``."""

    ids: Tensor
    is_teacher: Tensor
    uniforms: Tensor
    weights: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    rewards: Tensor | None = None

    def rows(self, chosen: Tensor) -> "Tokens":
        """Some of the tokens."""
        return Tokens(*(None if v is None else v[chosen] for v in vars(self).values()))


@dataclass
class Answer:
    """What the code under test should find."""

    values: dict[str, Tensor]
    """[T] float64 each, by the names of ``LossOutput.values``."""
    gradient_TV: Tensor
    """[T, V] float64: row t is the gradient of weight x surrogate of token t."""


def answer(student: Tensor, teacher: Tensor, tokens: Tokens, settings: dict, *, beta) -> Answer:
    """Values and gradient of every token.

    Args:
        student, teacher: [T, V] logits of the real columns, any float dtype.
        tokens: the tokens.
        settings: of ``DEFAULTS`` or ``BATCH_WIDE``.
        beta: weight of teacher tokens.
    """
    leaf = student.detach().double().requires_grad_()
    surrogate, values = losses(leaf, teacher.detach().double(), tokens, settings, beta=beta)
    surrogate.sum().backward()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    if tokens.weights is not None:  # a token left out has no gradient even if its term is infinite
        gradient = torch.where(tokens.weights.unsqueeze(-1) == 0, 0.0, gradient)
    return Answer(values, gradient)


def losses(student: Tensor, teacher: Tensor, tokens: Tokens, settings: dict, *, beta: float):
    """(weighted surrogates [T], differentiable, values by name [T] each); as :func:`answer`."""
    unknown = settings.keys() - DEFAULTS.keys() - set(BATCH_WIDE) - {"divergence"}
    assert not unknown, unknown
    s = DEFAULTS | LIKE.get(settings.get("method"), {}) | settings
    of_teacher = of_token(Models(student, teacher, tokens.ids, 0))
    if s["method"] == "veto":
        s["objective"] = s["divergence"]
        teacher = product(teacher, student.detach(), s["student_power"])
    num = len(tokens.ids)
    guided = tokens.is_teacher if s["teacher_tokens"] == "nll" else torch.zeros(num).bool()
    student_term = policy_gradient if s["objective"] == "policy_gradient" else divergence

    # The two writers' tokens apart: what one has of infinities is nothing to the other.
    surrogate = torch.zeros(num, dtype=torch.float64)
    values = {"term": surrogate, "outlier": surrogate, "dropped": surrogate}
    values["importance"] = torch.ones_like(surrogate)
    for rows in (guided, ~guided):
        models = Models(student[rows], teacher[rows], tokens.ids[rows], s["top_k"], s["support"])
        if rows is guided:
            part, found = negative_log_likelihood(models, beta, s["gradient"])
        else:
            part, found = student_term(models, tokens.rows(rows), s)
        surrogate = surrogate.masked_scatter(rows, part)
        for name, column in found.items():
            values[name] = values[name].masked_scatter(rows, column)
    weights = torch.ones(num) if tokens.weights is None else tokens.weights
    values["loss"] = times(weights.double(), values["term"])
    surrogate = times(weights.double(), surrogate)
    found = metrics(Models(student, teacher, tokens.ids, s["top_k"]))
    return surrogate, values | found | of_teacher


def product(teacher: Tensor, student: Tensor, power: float) -> Tensor:
    """[T, V] log of p q^b / Z."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    raised = torch.zeros_like(log_q) if power == 0 else power * log_q
    return log_p + raised - torch.logsumexp(log_p + raised, -1, keepdim=True)


class Models:
    """Both distributions; ``log_q`` carries the gradient, everything else is constant."""

    def __init__(
        self, student: Tensor, teacher: Tensor, ids: Tensor, top_k: int, support: str = "teacher"
    ):
        self.log_q, self.log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        self.lq = self.log_q.detach()
        self.p, self.q = self.log_p.exp(), self.lq.exp()
        self.ids = ids
        self.log_q_x = self.at(self.log_q)
        # A token that neither writes: they agree about it.
        both = (self.at(self.log_p) == -math.inf) & (self.at(self.lq) == -math.inf)
        self.ratio_x = torch.where(both, 0.0, self.at(self.log_p) - self.at(self.lq))
        self.trust_x = self.ratio_x.clamp(max=0).exp()
        self.overlap = torch.minimum(self.log_p, self.lq).exp()
        self.tv = (1 - self.overlap.sum(-1)).clamp(min=0)
        self.teacher_entropy = -times(self.p, self.log_p).sum(-1)
        ranked = student.detach() if support == "student" else teacher
        self.support = top_k_ids(ranked, min(top_k, teacher.shape[-1]))

    def at(self, columns: Tensor) -> Tensor:
        """[T] the column of each row's token."""
        return columns.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def on_support(self, columns: Tensor) -> Tensor:
        """[T, K] the columns of the top-k."""
        return columns.gather(-1, self.support)

    def forward_kl(self) -> Tensor:
        """[T] sum p (log p - log q) over the top-k, not renormalised; all of it if k = 0."""
        if self.support.shape[-1] == 0:
            return times(self.p, self.log_p - self.log_q).sum(-1)
        log_p, log_q = self.on_support(self.log_p), self.on_support(self.log_q)
        return times(log_p.exp(), log_p - log_q).sum(-1)

    def entropy_forward_kl(self) -> Tensor:
        """[T] sum p^ (log p^ - log q) over the top-k, p^ = p renormalised there."""
        log_p = self.on_support(self.log_p).log_softmax(-1)
        return times(log_p.exp(), log_p - self.on_support(self.log_q)).sum(-1)


def times(weight: Tensor, value: Tensor) -> Tensor:
    """Weight x value with 0 x infinity = 0, in the gradient as well; the weight is constant."""
    used = weight.detach() != 0
    return torch.where(used, weight.detach() * torch.where(used, value, 0.0), 0.0)


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """[T, k] ids of the largest logits, largest first, ties to the lower id."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def reward_floor(s: dict) -> float | None:
    """tau, or what follows from REOPOLD's l."""
    if s["floor"] is None:
        return s["tau"]
    share = s["floor"]
    if s["floor_rule"] == "log(l)/(1-l)":
        return math.log(share) / (1 - share)
    assert s["floor_rule"] == "log(l/(1-l))"
    return math.log(share / (1 - share))


def negative_log_likelihood(m: Models, beta: float, gradient: str):
    """-beta log q(x), or with score_function the loss of the reward beta (log q(x) - log p(x))."""
    if gradient == "score_function":
        reward = -beta * m.ratio_x
        return -times(reward, m.log_q_x), dict(term=-reward)
    value = -beta * m.log_q_x
    return value, dict(term=value.detach())


def policy_gradient(m: Models, tokens: Tokens, s: dict):
    """Student tokens of the sampled losses and of the exact one."""
    if s["region"] == "exact":
        return exact_trust_region(m, s)
    reward = sampled_reward(m, tokens, s)
    inside = trusted_share(m, tokens, s)
    outside_kl = s["outlier"] == "forward_kl" and s["region"] != "none"
    by_score = s["gradient"] == "score_function"

    # What the token earns: the policy gradient's part of its loss.
    share = torch.where(inside < UNDERFLOW, 0.0, inside)
    earned = times(share, reward)
    if s["outlier"] == "clip" and s["region"] != "none":
        earned = earned + times(1 - share, reward.clamp(min=reward_floor(s)))
    unwritten = (m.at(m.p) == 0) & (m.at(m.q) == 0)
    infinite = ~earned.isfinite() | unwritten
    earned = earned.where(~infinite, 0.0)
    if outside_kl and by_score:
        earned = earned - times(1 - inside, m.forward_kl().detach())
    rho = torch.ones_like(inside)
    if s["importance"] != "none":
        rho = (m.at(m.lq) - tokens.rollout_logprobs.double()).exp()
    credit, worth, clipped = rho_of_ppo(rho, earned, s)
    surrogate, value = -times(times(credit, earned), m.log_q_x), -times(worth, earned)

    # The divergences, which are no rewards.
    without_gradient = infinite | clipped
    for weight, distance in (
        *([(1 - inside, m.forward_kl())] if outside_kl and not by_score else []),
        *([uncertain_kl(m, s)] if s["entropy_forward_kl"] is not None else []),
    ):
        added = times(weight, distance)
        surrogate, value = surrogate + added, value + added.detach()
        without_gradient &= weight < 1e-7  # what float32 takes for none

    factor = torch.ones_like(inside)
    if s["importance"] == "truncated":
        factor = rho.clamp(max=s["importance_high"])
    if s["importance"] == "band":
        within = (rho >= s["importance_low"]) & (rho <= s["importance_high"])
        factor, without_gradient = torch.where(within, rho, 0.0), without_gradient | ~within
    surrogate, value = times(factor, surrogate), times(factor, value)
    dropped = without_gradient.double()
    return surrogate, dict(term=value, outlier=1 - inside, dropped=dropped, importance=rho)


def trusted_share(m: Models, tokens: Tokens, s: dict) -> Tensor:
    """[T] how much of each token lies inside the trust region."""
    if s["region"] == "none":
        return torch.ones_like(m.ratio_x)
    if s["region"] == "expected":
        return m.trust_x
    if s["region"] == "bernoulli":
        return (tokens.uniforms.double() < m.trust_x).double()
    assert s["region"] == "threshold"
    if s["floor"] is not None:  # REOPOLD's R >= c; the static test of TrOPD's ablation is strict
        return (m.ratio_x >= reward_floor(s)).double()
    return (m.ratio_x > reward_floor(s)).double()


def uncertain_kl(m: Models, s: dict) -> tuple[Tensor, Tensor]:
    """EOPD's ([T] 1 where the teacher's entropy is high, [T] forward KL)."""
    uncertain = m.teacher_entropy > s["entropy_forward_kl"]
    return uncertain.double(), m.entropy_forward_kl()


def sampled_reward(m: Models, tokens: Tokens, s: dict) -> Tensor:
    """[T] R: log p/q, log(a p/q + 1 - a), or what the caller says."""
    if tokens.rewards is not None:
        return tokens.rewards.double()
    if s["reward"] == "proximal":
        share, ratio = s["proximal_alpha"], m.at(m.log_p) - m.at(m.lq)
        large = torch.logaddexp(math.log(share) + ratio, torch.full_like(ratio, math.log1p(-share)))
        # Exactly 0 where the models agree, for its sign decides about PPO's clip.
        return torch.where(ratio < 100, torch.log1p(share * torch.expm1(ratio)), large)
    if s["reward"] == "fixed":
        return torch.full_like(m.ratio_x, s["advantage"])
    if s["reward"] == "power":
        return m.at(m.p) ** s["power"] - m.at(m.q) ** s["power"]
    return m.at(m.log_p) - m.at(m.lq)  # no number where neither writes it


def rho_of_ppo(rho: Tensor, reward: Tensor, s: dict) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's factors of a reward in gradient and value, and whether it is clipped; 1, 1, no."""
    if s["importance"] != "ppo":
        return torch.ones_like(rho), torch.ones_like(rho), torch.zeros_like(rho).bool()
    low, high = s["importance_low"], s["importance_high"]
    clipped = ((reward > 0) & (rho > high)) | ((reward < 0) & (rho < low))
    # The smaller product: with the smaller of the two factors if the reward is positive.
    inside = rho.clamp(low, high)
    worth = torch.where(reward > 0, torch.minimum(rho, inside), torch.maximum(rho, inside))
    return torch.where(clipped, 0.0, rho), worth, clipped


def exact_trust_region(m: Models, s: dict):
    """The mean over x ~ q and the draw, in closed form."""
    ratio = m.log_p - m.lq
    credit = times(m.overlap, ratio)
    if s["outlier"] == "clip":
        # q - min(p, q), without cancellation where p is close to q.
        above = -m.q * torch.expm1(torch.where(m.q > 0, ratio, 0.0).clamp(max=0))
        credit = credit + times(above, ratio.clamp(min=reward_floor(s)))
    surrogate, value = -times(credit, m.log_q).sum(-1), -credit.sum(-1)
    if s["outlier"] == "forward_kl":
        outside = times(m.tv, m.forward_kl())
        surrogate, value = surrogate + outside, value + outside.detach()
    none = torch.zeros_like(value)
    return surrogate, dict(term=value, outlier=m.tv, dropped=none, importance=none + 1)


def divergence(m: Models, tokens: Tokens, s: dict):
    """The objectives that are a divergence at every position."""
    del tokens
    if s["objective"] == "power":
        return expected_power(m, s["power"])
    distance = {
        "forward_kl": lambda: times(m.p, m.log_p - m.log_q).sum(-1),
        "reverse_kl": lambda: kl(m.log_q, m.log_p),
        "jsd": lambda: jsd(m, s["jsd_beta"]),
        "local_support": lambda: local_support(m, s["renormalise"]),
    }[s["objective"]]()
    none = torch.zeros_like(distance.detach())
    return distance, dict(term=distance.detach(), outlier=none, dropped=none, importance=none + 1)


def local_support(m: Models, renormalise: bool) -> Tensor:
    """[T] KL(q || p) on the top-k."""
    log_q, log_p = m.on_support(m.log_q), m.on_support(m.log_p)
    if renormalise:
        return kl(log_q.log_softmax(-1), log_p.log_softmax(-1))
    return kl(log_q, log_p) - log_q.exp().sum(-1) + log_p.exp().sum(-1)


def expected_power(m: Models, power: float):
    """The mean of (p^a - q^a) log q over x ~ q, the reward held constant."""
    credit = m.q * (m.p**power - m.q**power)
    none = torch.zeros_like(m.tv)
    surrogate = -times(credit, m.log_q).sum(-1)
    return surrogate, dict(term=-credit.sum(-1), outlier=none, dropped=none, importance=none + 1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """[T] sum a (log a - log b), the gradient through both."""
    used = log_a.detach() > -math.inf
    a, ratio = torch.where(used, log_a, 0.0), torch.where(used, log_a - log_b, 0.0)
    return torch.where(used, a.exp() * ratio, 0.0).sum(-1)


def jsd(m: Models, share: float) -> Tensor:
    """[T] b KL(p || mix) + (1 - b) KL(q || mix), mix = b p + (1 - b) q."""
    written = (m.log_p > -math.inf) | (m.lq > -math.inf)
    parts = math.log(share) + m.log_p, math.log(1 - share) + m.log_q
    log_mix = torch.logaddexp(*(torch.where(written, part, 0.0) for part in parts))
    return share * kl(m.log_p, log_mix) + (1 - share) * kl(m.log_q, log_mix)


def of_token(m: Models) -> dict[str, Tensor]:
    """[T] each: what is reported of the token, whatever stands in the teacher's place elsewhere."""
    return {
        "student_logprob": m.at(m.lq),
        "teacher_logprob": m.at(m.log_p),
        "trust": m.trust_x,
        "k1": -m.ratio_x,
    }


def metrics(m: Models) -> dict[str, Tensor]:
    """[T] each: what is reported besides the loss."""
    return {
        "tv": m.tv,
        "reverse_kl": kl(m.lq, m.log_p),
        "forward_kl": kl(m.log_p, m.lq),
        "student_entropy": -times(m.q, m.lq).sum(-1),
        "teacher_entropy": m.teacher_entropy,
    }


def top_k_masses(
    student: Tensor, teacher: Tensor, k: int, *, by_student: bool = False
) -> dict[str, Tensor]:
    """[T] each: probability of both on the teacher's top-k, or on the student's."""
    ids = top_k_ids((student if by_student else teacher).double(), k)
    return {
        "topk_mass_teacher": teacher.double().softmax(-1).gather(-1, ids).sum(-1),
        "topk_mass_student": student.double().softmax(-1).gather(-1, ids).sum(-1),
    }
