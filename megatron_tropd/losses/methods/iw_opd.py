"""IW-OPD: early tokens of a response weigh more: arXiv 2606.22600."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Amount
from megatron_tropd.losses.methods.opd import Opd

if TYPE_CHECKING:
    from megatron_tropd.losses.method import BatchFacts, TokenChoices


@dataclass(frozen=True, kw_only=True)
class IwOpd(Opd):
    """OPD, each reward weighted by what its response has left of the disagreement."""

    gain: Amount = 0.5
    """g: the weight falls from 1 + g at the first token towards 1. 0: OPD."""

    @property
    def needs(self) -> Needs:
        """The student's pass before the step."""
        return replace(super().needs, student_pass=True)

    def choose(self, facts: BatchFacts) -> TokenChoices:
        """Weighted rewards."""
        from megatron_tropd.losses.selection import early_weight

        reward_T = self.reward(facts.log_ratio_T)
        weight_T = early_weight(
            reward_T,
            facts.student_T,
            rows_T=facts.own_rows_T,
            positions_T=facts.positions_T,
            shape=facts.shape,
            group=facts.row_group,
            gain=self.gain,
        )
        return replace(super().choose(facts), rewards_T=weight_T * reward_T)


METHOD = IwOpd
