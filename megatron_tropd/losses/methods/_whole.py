"""What the methods share whose loss is a KL over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_tropd.config.loss import Needs
from megatron_tropd.losses.method import Divergence, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class WholeKl(Divergence):
    """KL in one of its two directions."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    """KL(target||q), KL(q||target), or what a method makes of it."""

    @property
    def needs(self) -> Needs:
        """The KL's sum and gradient."""
        if self.divergence == "forward_kl":
            return Needs(sums=("forward_kl",), teacher_gradient=True)
        return Needs(sums=("reverse_kl",), reward="log_ratio")

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The KL."""
        if self.divergence == "forward_kl":
            return terms.forward_kl(statistics)
        return terms.reverse_kl(statistics)
