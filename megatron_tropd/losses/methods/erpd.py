"""ERPD's second stage, a reconstruction: arXiv 2605.25582 (docs/erpd.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.losses.method import Clipped, terms
from megatron_tropd.losses.methods.delta import Delta

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class Erpd(Clipped, Delta):
    """The reward log p - log p_ref within a trust region, by default PPO's."""

    region: Literal["none", "bernoulli", "expected"] = "none"
    """TrOPD's region beside that of ``importance``: a token is trusted with probability
    min(p/q, 1), by a draw or in the mean; an untrusted one gets no reward."""

    def _check_together(self) -> None:
        super()._check_together()
        if self.over == "vocabulary" and self.region != "none":
            raise ConfigError(
                "loss.region goes with loss.over = 'sampled' only, found region = "
                f"{self.region!r}. Set loss.region = 'none', or loss.over = 'sampled'."
            )

    @property
    def needs(self) -> Needs:
        """The draws, too."""
        regional = self.region != "none"
        return replace(super().needs, draws=self.region == "bernoulli", outliers=regional)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The reward of trusted tokens."""
        if self.region == "none":
            return super().term(statistics, targets)
        ratio_T = statistics.log_ratio_T
        drawn = self.region == "bernoulli"
        trusted_T = terms.drawn(ratio_T, targets.uniforms_T) if drawn else terms.trust(ratio_T)
        earned = terms.earned(statistics, targets, self.reward(statistics), trusted_T)
        return self.policy_gradient(statistics, targets, earned, outlier_T=1 - trusted_T)


METHOD = Erpd
