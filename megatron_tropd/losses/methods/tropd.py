"""TrOPD, trust-region on-policy distillation: arXiv 2606.01249."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Finite
from megatron_tropd.losses.method import terms
from megatron_tropd.losses.methods._trust_region import TrustRegion, check_tau

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets


@dataclass(frozen=True, kw_only=True)
class Tropd(TrustRegion):
    """A token is trusted with probability m = min(p/q, 1); the defaults are TrOPD as published."""

    region: Literal["bernoulli", "expected"] = "bernoulli"
    """Whether a token is trusted: the draw M ~ Bernoulli(m), or its mean."""
    tau: Finite | None = None
    """Floor of the log-ratio for outlier = clip. Unpublished: no default."""

    def _check_together(self) -> None:
        check_tau(self.outlier, self.tau)
        if self.region == "expected" and self.gradient == "score_function":
            raise ConfigError(
                "loss.gradient = 'score_function' goes with loss.region = 'bernoulli' only, found "
                "region = 'expected'. Change one of them."
            )

    @property
    def reward_floor(self) -> float | None:
        """``tau``."""
        return self.tau

    @property
    def needs(self) -> Needs:
        """The draws, too."""
        return replace(super().needs, draws=self.region == "bernoulli")

    def trusted(self, statistics: TokenStatistics, targets: LossTargets) -> Tensor:
        """[T] the draw, or its mean."""
        if self.region == "expected":
            return terms.trust(statistics.log_ratio_T)
        return terms.drawn(statistics.log_ratio_T, targets.uniforms_T)


METHOD = Tropd
