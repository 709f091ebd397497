"""What the methods with a trust region for sampled tokens share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.losses.method import Outlier, SampledMethod, TopK, terms

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class TrustRegion(SampledMethod, ABC):
    """The log-ratio as reward of trusted tokens, another rule for the others."""

    outlier: Outlier = "forward_kl"
    """What an untrusted token gets: forward KL, nothing, or the reward max(log p/q, tau)."""
    top_k: TopK = 64
    """Support of the outliers' forward KL: the teacher's k most likely tokens. 0: the whole
    vocabulary."""

    @property
    @abstractmethod
    def reward_floor(self) -> float | None:
        """Floor of a clipped outlier's log-ratio, in nats."""

    @abstractmethod
    def trusted(self, statistics: TokenStatistics, targets: LossTargets) -> Tensor:
        """[T] float share of each token inside the region."""

    @property
    def needs(self) -> Needs:
        """The top-k or the whole vocabulary for the outliers' forward KL."""
        diverges = self.outlier == "forward_kl"
        whole = diverges and not self.top_k
        return replace(
            super().needs,
            top_k=self.top_k if diverges else 0,
            sums=("forward_kl",) if whole else (),
            teacher_gradient=whole and self.gradient == "backprop",
            outliers=True,
        )

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """Reward of the sampled token inside the trust region, the outlier rule outside."""
        trusted_T = self.trusted(statistics, targets)
        outlier_T = 1.0 - trusted_T
        clip_at = self.reward_floor if self.outlier == "clip" else None
        reward_T = statistics.log_ratio_T
        earned_T, infinite_T = terms.earned(statistics, targets, reward_T, trusted_T, clip_at)
        divergence = None
        if self.outlier == "forward_kl" and self.gradient == "score_function":
            kl_T = terms.outlier_divergence(statistics, self.top_k)
            earned_T = earned_T - terms.times(outlier_T, kl_T)
        elif self.outlier == "forward_kl":
            divergence = terms.forward_kl_outlier(statistics, self.top_k, outlier_T)
        return self.policy_gradient(
            statistics,
            targets,
            (earned_T, infinite_T),
            outlier_T=outlier_T,
            divergence=divergence,
        )


def check_tau(outlier: Outlier, tau: float | None) -> None:
    """Raise ConfigError unless a floor is given exactly if outliers are clipped."""
    if outlier == "clip" and tau is None:
        raise ConfigError(
            "loss.outlier = 'clip' needs loss.tau, a log-ratio in nats such as -2.5 (the paper "
            "does not publish its value)."
        )
    if outlier != "clip" and tau is not None:
        raise ConfigError(
            f"loss.tau is read with loss.outlier = 'clip' only, found outlier = {outlier!r}. Leave "
            "tau out, or clip."
        )
