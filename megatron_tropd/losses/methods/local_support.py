"""The reverse KL on a top-k (sources: docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Count
from megatron_tropd.losses.method import Divergence, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class LocalSupport(Divergence):
    """KL(q||p) on the k most likely tokens of one model."""

    top_k: Count = 32
    """How many of them (of the whole vocabulary: gkd with reverse_kl)."""
    support: Literal["teacher", "student"] = "teacher"
    """Whose: the student's needs the whole teacher."""
    renormalise: bool = True
    """Make both distributions sum to 1 there; false: the sum of q (log q - log p) - q + p, the KL
    of what need not sum to 1."""

    @property
    def needs(self) -> Needs:
        """The top-k."""
        return Needs(top_k=self.top_k, student_top_k=self.support == "student")

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The divergence."""
        return terms.local_support(statistics, renormalise=self.renormalise)


METHOD = LocalSupport
