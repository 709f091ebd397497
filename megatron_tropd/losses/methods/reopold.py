"""REOPOLD: outliers are masked first and clipped from a step on: arXiv 2603.11137."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from megatron_tropd.config.loss import FloorRule, Needs, floor_of
from megatron_tropd.config.settings import Between, Number, Share
from megatron_tropd.losses.method import Outlier, terms
from megatron_tropd.losses.methods._trust_region import TrustRegion
from megatron_tropd.losses.methods.static import Static

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets


@dataclass(frozen=True, kw_only=True)
class Reopold(TrustRegion):
    """Two phases of the static region: ``at_step`` says which."""

    outlier: Outlier = "mask"
    """What an untrusted token gets before switch_step; from then on it is clipped."""
    floor: Between = 0.2
    """l in (0, 1), from which the floor of the log-ratio follows by floor_rule."""
    floor_rule: FloorRule = "log(l)/(1-l)"
    """How the floor follows from l; implementations disagree."""
    switch_step: Number = 100
    """From this step (0-based) on outliers are clipped, and only entropy_share is trained."""
    entropy_share: Share | None = 0.2
    """From switch_step on, train only this share of the student's tokens: those with the largest
    student entropy of the global batch. Needs a forward pass of the student before the step."""

    @property
    def reward_floor(self) -> float:
        """What follows from ``floor``, in nats."""
        return floor_of(self.floor, self.floor_rule)

    @property
    def needs(self) -> Needs:
        """The second phase chooses tokens by the whole batch."""
        return replace(super().needs, student_pass=True)

    def at_step(self, step: int) -> Any:
        """The phase of a step: all tokens and ``outlier``, then the uncertain ones and clipping."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _OF_BOTH_PHASES}
        if step < self.switch_step:
            return Static(outlier=self.outlier, **kept)
        return Static(outlier="clip", entropy_share=self.entropy_share, **kept)

    def trusted(self, statistics: TokenStatistics, targets: LossTargets) -> Tensor:
        """[T] whether the log-ratio is at least the floor."""
        return terms.above(statistics.log_ratio_T, self.reward_floor, keeps_floor=True)


_OF_BOTH_PHASES = {f.name for f in fields(Static)} - {"outlier", "entropy_share"}
METHOD = Reopold
