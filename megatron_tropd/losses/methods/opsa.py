"""OPSA's control: unlikely tokens become unlikelier, without a teacher: arXiv 2608.31046."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Range, Share
from megatron_tropd.losses.method import SampledMethod, terms

if TYPE_CHECKING:
    from megatron_tropd.losses.method import BatchFacts, TokenChoices
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term

Negative = Annotated[float, Range(most=0, ends="[)")]


@dataclass(frozen=True, kw_only=True)
class Opsa(SampledMethod):
    """One fixed reward for the student's least likely tokens; the teacher is measured only."""

    lowest_share: Share = 0.2
    """Train only this share of the student's tokens: those with the smallest q(x) of the global
    batch. Needs a forward pass of the student before the step."""
    advantage: Negative = -1.0
    """Reward of each of them. The paper's control says no size."""

    def _check_together(self) -> None:
        if self.entropy_share is not None:
            raise ConfigError(
                "loss.method = 'opsa' chooses tokens by loss.lowest_share, found entropy_share = "
                f"{self.entropy_share} as well. Leave it out."
            )

    @property
    def needs(self) -> Needs:
        """The student's pass before the step."""
        return replace(super().needs, student_pass=True)

    @property
    def trained_share(self) -> float | None:
        """``lowest_share``."""
        return self.lowest_share

    def choose(self, facts: BatchFacts) -> TokenChoices:
        """The least likely tokens."""
        return self.select(facts, -facts.student_logprob_T, self.lowest_share)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """Reward x log q of the sampled token."""
        import torch

        reward_T = torch.full_like(statistics.student_logprob_T, self.advantage)
        # A reward that asks neither model would hide that one of them is broken.
        seen_T = statistics.student_logprob_T + statistics.teacher_logprob_T
        reward_T = torch.where(seen_T.isnan(), torch.nan, reward_T)
        return self.policy_gradient(
            statistics, targets, terms.earned(statistics, targets, reward_T)
        )


METHOD = Opsa
