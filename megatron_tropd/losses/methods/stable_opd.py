"""StableOPD, which holds OPD near to its start and to golden answers: arXiv 2604.08527."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs, Powers
from megatron_tropd.config.settings import Amount
from megatron_tropd.losses.method import terms
from megatron_tropd.losses.methods._reference import Referenced

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class StableOpd(Referenced):
    """OPD + beta KL(q || p_ref), and lambda (-log q) on golden answers.

    Both KLs together are (1 + beta) KL(q || t) - (1 + beta) log Z with the target
    t = p^(1 / (1 + beta)) p_ref^(beta / (1 + beta)) / Z.
    """

    reference_weight: Amount = 0.1
    """beta of KL(q || p_ref), over the whole vocabulary whatever ``over`` says of OPD. p_ref is
    teacher.reference = "student", the weights of step 0. 0: no reference is read."""
    golden_weight: Amount = 0.1
    """lambda of -log q(x) on the tokens of golden answers (guidance.golden_field), a mean over
    these tokens alone. 0: no golden answers are read."""

    @property
    def powers(self) -> Powers:
        """Those of the target of both KLs."""
        whole = 1 + self.reference_weight
        return Powers(teacher=1 / whole, reference=self.reference_weight / whole)

    @property
    def needs(self) -> Needs:
        """Both models over the vocabulary, and golden answers; less if a weight is 0."""
        anchored = self.reference_weight > 0
        needs = replace(super().needs, reference=anchored, golden=self.golden_weight > 0)
        if self.over == "vocabulary" or not anchored:
            return needs
        only = Powers(teacher=0, reference=1)
        return replace(needs, sums=("reverse_kl",), reward="log_ratio", target=only)

    def reward(self, statistics: TokenStatistics) -> Tensor:
        """[T] nats, OPD's."""
        return statistics.log_ratio_T

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """OPD of the sampled token and the exact KL to the reference, or both KLs exact."""
        weight = statistics.student_logprob_T.new_full((), self.reference_weight)
        if self.over == "vocabulary":
            return terms.tilted_kl(statistics).scaled(1 + weight)
        anchor = terms.reverse_kl(statistics).scaled(weight) if self.reference_weight else None
        earned = terms.earned(statistics, targets, self.reward(statistics))
        return self.policy_gradient(statistics, targets, earned, divergence=anchor)

    def whole_term(self, statistics: TokenStatistics, targets: LossTargets, beta: float) -> Term:
        """The loss of every token, golden ones included."""
        term = super().whole_term(statistics, targets, beta)
        if targets.is_golden_T is None:
            return term
        golden = terms.teacher_token(statistics, self.golden_weight)
        return terms.where(targets.is_golden_T, golden, term)


METHOD = StableOpd
