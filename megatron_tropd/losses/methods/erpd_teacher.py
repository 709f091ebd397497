"""ERPD's first stage, a reconstruction: arXiv 2605.25582 (docs/erpd.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Positive
from megatron_tropd.losses.method import Method, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class ErpdTeacher(Method):
    """(b (log q - log p) - A)^2: the teacher p is what the student starts from."""

    scale: Positive = 1.0
    """b: the fit gives a token that raises the expected outcome by A a log-ratio of A / b."""

    @property
    def needs(self) -> Needs:
        """A, of graded rollouts; any policy may have sampled them."""
        return Needs(outcomes=True)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The squared error of the token's log-ratio."""
        return terms.ratio_fit(statistics, targets, self.scale)


METHOD = ErpdTeacher
