"""Veto: the target lies between teacher and student at first: arXiv 2601.07155."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Number, Range
from megatron_tropd.losses.method import Method

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term

Exponent = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Veto(Method):
    """A divergence between the student and t = p q^b / Z over the whole vocabulary.

    The target is held constant: the paper's gradient of the reverse KL is a policy gradient with
    the reward log p - (1 - b) log q, which has no term for t.
    """

    divergence: Literal["forward_kl", "reverse_kl"]
    """KL(t||q) or KL(q||t)."""
    student_power: Exponent = 0.8
    """b at the first step."""
    decay_steps: Number = 100
    """Steps in which b falls linearly to 0 (the paper: all steps of the run). 0: b stays."""
    teacher_tokens: Literal["nll", "same"] = "nll"
    """Loss of tokens the teacher wrote: -beta log q(x), or the divergence."""

    def at_step(self, step: int) -> Any:
        """The target of a step."""
        if not self.decay_steps:
            return self
        left = max(0.0, 1 - step / self.decay_steps)
        return replace(self, student_power=self.student_power * left, decay_steps=0)

    @property
    def needs(self) -> Needs:
        """The divergence's sums and gradient, with the target in the teacher's place."""
        if self.divergence == "forward_kl":
            made = Needs(sums=("forward_kl",), teacher_gradient=True)
        else:
            made = Needs(sums=("reverse_kl",), reward="log_ratio")
        return replace(made, student_power=self.student_power)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The divergence."""
        from megatron_tropd.losses import terms

        if self.divergence == "forward_kl":
            return terms.forward_kl(statistics)
        return terms.reverse_kl(statistics)

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """-beta log q(x), unless ``same`` is asked for."""
        same = self.teacher_tokens == "same"
        return None if same else super().teacher_term(statistics, beta)


METHOD = Veto
