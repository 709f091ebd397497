"""The reverse KL on the teacher's top-k (sources: docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Count
from megatron_tropd.losses.method import Method

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class LocalSupport(Method):
    """KL(q||p) with both renormalised on the teacher's top-k."""

    top_k: Count = 32
    """The teacher's k most likely tokens (of the whole vocabulary: gkd with reverse_kl)."""
    teacher_tokens: Literal["nll", "same"] = "nll"
    """Loss of tokens the teacher wrote: -beta log q(x), or the divergence."""

    @property
    def needs(self) -> Needs:
        """The teacher's top-k."""
        return Needs(top_k=self.top_k)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The divergence."""
        from megatron_tropd.losses import terms

        return terms.local_support(statistics)

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """-beta log q(x), unless ``same`` is asked for."""
        same = self.teacher_tokens == "same"
        return None if same else super().teacher_term(statistics, beta)


METHOD = LocalSupport
