"""TOP-D: rewards that look at later tokens and at a prompt's other samples (docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Share
from megatron_tropd.losses.method import Clipped
from megatron_tropd.losses.methods.opd import Opd

if TYPE_CHECKING:
    from megatron_tropd.losses.method import BatchFacts, TokenChoices


@dataclass(frozen=True, kw_only=True)
class TopD(Clipped, Opd):
    """OPD with the proximal teacher and rewards of the whole batch."""

    proximal_alpha: Share = 0.1
    """a in (0, 1]: the reward is log(a p/q + 1 - a)."""
    future: Literal["none", "mean"] = "mean"
    """mean: add to each reward the mean reward of the later student tokens. Needs a forward pass
    of the student before the step."""
    group_normalise: bool = True
    """Standardise rewards over the student tokens of all samples of a prompt."""

    @property
    def needs(self) -> Needs:
        """The student's pass before the step."""
        return replace(super().needs, student_pass=True)

    def choose(self, facts: BatchFacts) -> TokenChoices:
        """Rewards of the whole batch."""
        from megatron_tropd.losses.selection import future_mean, group_normalise

        reward_T = self.reward(facts.log_ratio_T)
        choices = super().choose(facts)
        if self.future == "mean":
            reward_T = future_mean(
                reward_T,
                facts.student_T,
                rows_T=facts.own_rows_T,
                positions_T=facts.positions_T,
                shape=facts.shape,
                group=facts.row_group,
            )
        if self.group_normalise:
            reward_T = group_normalise(
                reward_T,
                facts.student_T,
                facts.prompts_T,
                num_groups=facts.num_prompts,
                group=facts.group,
            )
        return replace(choices, rewards_T=reward_T)


METHOD = TopD
