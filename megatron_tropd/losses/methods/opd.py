"""Plain on-policy distillation, and the proximal teacher (sources: docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.config.settings import Share
from megatron_tropd.losses.method import SampledMethod, terms

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class Opd(SampledMethod):
    """Reward of every sampled token: log p/q, or that of a teacher mixed with the student."""

    proximal_alpha: Share = 1.0
    """a in (0, 1], the teacher's share in the proximal teacher: the reward is
    log(a p/q + 1 - a). 1: log p/q."""

    def reward(self, log_ratio_T: Tensor) -> Tensor:
        """[T] nats, from log p(x) - log q(x)."""
        return terms.proximal_reward(log_ratio_T, self.proximal_alpha)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """Reward x log q of the sampled token."""
        earned = terms.earned(statistics, targets, self.reward(statistics.log_ratio_T))
        return self.policy_gradient(statistics, targets, earned)


METHOD = Opd
