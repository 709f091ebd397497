"""A loss method of your own: ``loss.method = "own_method:Squared"``."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Amount
from megatron_tropd.losses.method import Method


@dataclass(frozen=True, kw_only=True)
class Squared(Method):
    """(log p/q)^2 / 2 of the sampled token, plus a share of KL(q||p)."""

    share: Amount = 0.5
    """Weight of the reverse KL."""

    @property
    def needs(self) -> Needs:
        return Needs(sums=("reverse_kl",), reward="log_ratio")

    def term(self, statistics: Any, targets: Any) -> Any:
        from megatron_tropd.losses import terms

        ratio_T = statistics.log_ratio_T
        term = terms.reverse_kl(statistics).scaled(ratio_T.new_full((), self.share))
        # d/d log q of (log p - log q)^2 / 2 is -(log p - log q).
        return replace(term, value_T=term.value_T + ratio_T**2 / 2, sampled_T=-ratio_T)
