"""PowerOPD's expectation over the sampled token, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Positive
from megatron_tropd.losses.method import Method, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class PowerOpdExact(Method):
    """The mean of the reward p^a - q^a over all tokens of the vocabulary."""

    power: Positive = 5.0
    """a: the larger, the more the likely tokens alone count."""

    @property
    def needs(self) -> Needs:
        """The sum of q (p^a - q^a) over the vocabulary."""
        return Needs(sums=("reward",), reward="power", power=self.power)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The closed form."""
        return terms.expected_reward(statistics)


METHOD = PowerOpdExact
