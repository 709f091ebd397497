"""PowerOPD: a bounded reward in place of the log-ratio: arXiv 2606.17199."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.config.settings import Positive
from megatron_tropd.losses.method import SampledMethod, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class PowerOpd(SampledMethod):
    """The reward of a sampled token is p^a - q^a, which has the sign of the log-ratio."""

    power: Positive = 5.0
    """a: the larger, the more the likely tokens alone count."""

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """Reward x log q of the sampled token."""
        reward_T = terms.power_reward(statistics, self.power)
        return self.policy_gradient(
            statistics, targets, terms.earned(statistics, targets, reward_T)
        )


METHOD = PowerOpd
