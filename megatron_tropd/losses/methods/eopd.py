"""EOPD, clipped OPD plus forward KL if the teacher is uncertain: arXiv 2603.07079."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Amount, Count
from megatron_tropd.losses.method import Clipped, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class Eopd(Clipped):
    """The log-ratio as reward, and a forward KL on tokens of high teacher entropy."""

    entropy_forward_kl: Amount = 0.8
    """Add the forward KL if the teacher's entropy exceeds this many nats."""
    top_k: Count = 16
    """Support of the forward KL, on which the teacher is renormalised."""

    @property
    def needs(self) -> Needs:
        """The teacher's top-k and its entropy."""
        return replace(super().needs, top_k=self.top_k, sums=("teacher_entropy",))

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The reward's term and the forward KL; PPO clips the reward alone."""
        earned = terms.earned(statistics, targets, statistics.log_ratio_T)
        divergence = terms.entropy_forward_kl(statistics, self.entropy_forward_kl)
        return self.policy_gradient(statistics, targets, earned, divergence=divergence)


METHOD = Eopd
