"""TrOPD's expectation over the sampled token and the draw, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Finite
from megatron_tropd.losses.method import Method, Outlier, TopK, terms
from megatron_tropd.losses.methods._trust_region import check_tau

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class TropdExact(Method):
    """The trust region over all tokens of the vocabulary in place of the sampled one."""

    outlier: Outlier = "forward_kl"
    """What the untrusted share gets: forward KL, nothing, or the reward max(log p/q, tau)."""
    top_k: TopK = 64
    """Support of the forward KL: the teacher's k most likely tokens. 0: the whole vocabulary."""
    tau: Finite | None = None
    """Floor of the log-ratio for outlier = clip. Unpublished: no default."""

    def _check_together(self) -> None:
        check_tau(self.outlier, self.tau)

    @property
    def needs(self) -> Needs:
        """Sums over the vocabulary, and the forward KL's support."""
        diverges = self.outlier == "forward_kl"
        whole = diverges and not self.top_k
        return Needs(
            top_k=self.top_k if diverges else 0,
            sums=("tv", "reward", *(("forward_kl",) if whole else ())),
            reward="trust_clip" if self.outlier == "clip" else "trust",
            reward_floor=self.tau or 0.0,
            teacher_gradient=whole,
            outliers=True,
        )

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The closed form."""
        support = self.top_k if self.outlier == "forward_kl" else None
        return terms.exact_trust_region(statistics, support)


METHOD = TropdExact
