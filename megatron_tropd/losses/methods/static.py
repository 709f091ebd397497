"""TrOPD's ablation with a fixed threshold in place of the trust test: arXiv 2606.01249."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import FloorRule, floor_of
from megatron_tropd.config.settings import Between, Finite
from megatron_tropd.losses.method import terms
from megatron_tropd.losses.methods._trust_region import TrustRegion

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets


@dataclass(frozen=True, kw_only=True)
class Static(TrustRegion):
    """A token is trusted if its log-ratio is large enough."""

    tau: Finite | None = None
    """Trust log p/q > tau; also the floor for outlier = clip. Unpublished: no default."""
    floor: Between | None = None
    """Instead of tau: REOPOLD's l in (0, 1), from which a floor follows by floor_rule. A log-ratio
    of exactly this floor is trusted."""
    floor_rule: FloorRule = "log(l)/(1-l)"
    """How the floor follows from l; implementations disagree."""

    def _check_together(self) -> None:
        if (self.tau is None) == (self.floor is None):
            raise ConfigError(
                "The threshold of loss.method = 'static' needs loss.tau, a log-ratio in nats such "
                "as -2.5 (the paper does not publish its value), or loss.floor: one of the two, "
                f"found tau = {self.tau} and floor = {self.floor}."
            )

    @property
    def reward_floor(self) -> float | None:
        """Floor of the log-ratio in nats: ``tau``, or what follows from ``floor``."""
        return self.tau if self.floor is None else floor_of(self.floor, self.floor_rule)

    def trusted(self, statistics: TokenStatistics, targets: LossTargets) -> Tensor:
        """[T] whether the log-ratio is above the floor."""
        assert self.reward_floor is not None
        # REOPOLD keeps R >= c; TrOPD's static test is log p/q > tau.
        keeps_floor = self.floor is not None
        return terms.above(statistics.log_ratio_T, self.reward_floor, keeps_floor=keeps_floor)


METHOD = Static
