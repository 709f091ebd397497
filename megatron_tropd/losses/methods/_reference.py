"""What the methods share that measure the teacher against a reference (``teacher.reference``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs, Powers
from megatron_tropd.losses.method import SampledMethod, terms

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term


@dataclass(frozen=True, kw_only=True)
class Referenced(SampledMethod, ABC):
    """The reward a log p + b log p_ref + (c - 1) log q, sampled or in closed form.

    Its mean over x ~ q is log Z - KL(q || t) with the target t = p^a p_ref^b q^c / Z, in which q
    has no gradient. So the closed form is the gradient of the reverse KL to t.
    """

    over: Literal["sampled", "vocabulary"] = "sampled"
    """sampled: the reward of the sampled token; vocabulary: its mean over the student's
    distribution, in closed form."""

    @property
    @abstractmethod
    def powers(self) -> Powers:
        """(a, b, c)."""

    def _check_together(self) -> None:
        sampled = {"importance": "none", "gradient": "backprop"}
        found = {name: getattr(self, name) for name in sampled}
        if self.over == "vocabulary" and found != sampled:
            raise ConfigError(
                f"loss.over = 'vocabulary' samples nothing and needs {sampled}, found {found}. "
                "Leave them at that, or set loss.over = 'sampled'."
            )

    @property
    def needs(self) -> Needs:
        """The reference: of the sampled token, or within the target."""
        if self.over == "sampled":
            return replace(super().needs, reference=True)
        sums = ("reverse_kl",)
        return Needs(sums=sums, reward="log_ratio", reference=True, target=self.powers)

    def reward(self, statistics: TokenStatistics) -> Tensor:
        """[T] nats; infinite where the reference excludes the token."""
        logprobs = (
            statistics.teacher_logprob_T,
            statistics.reference_logprob_T,
            statistics.student_logprob_T,
        )
        a, b, c = self.powers
        parts = [k * log_T for k, log_T in zip((a, b, c - 1), logprobs, strict=True) if k]
        return sum(parts[1:], parts[0]).masked_fill(logprobs[1].isneginf(), float("inf"))

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The reward's policy gradient, or the reverse KL to the target."""
        if self.over == "vocabulary":
            return terms.tilted_kl(statistics)
        earned = terms.earned(statistics, targets, self.reward(statistics))
        return self.policy_gradient(statistics, targets, earned)
