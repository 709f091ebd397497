"""Veto: the target lies between teacher and student at first: arXiv 2601.07155."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from megatron_tropd.config.loss import Needs, Powers
from megatron_tropd.config.settings import Number, Range
from megatron_tropd.losses.methods._whole import WholeKl

Exponent = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Veto(WholeKl):
    """A KL between the student and t = p q^b / Z over the whole vocabulary.

    The target is held constant: the paper's gradient of the reverse KL is a policy gradient with
    the reward log p - (1 - b) log q, which has no term for t.
    """

    divergence: Literal["forward_kl", "reverse_kl"]
    """KL(t||q) or KL(q||t)."""
    student_power: Exponent = 0.8
    """b at the first step."""
    decay_steps: Number = 100
    """Steps in which b falls linearly to 0 (the paper: all steps of the run). 0: b stays."""

    def at_step(self, step: int) -> Any:
        """The target of a step."""
        if not self.decay_steps:
            return self
        left = max(0.0, 1 - step / self.decay_steps)
        return replace(self, student_power=self.student_power * left, decay_steps=0)

    @property
    def needs(self) -> Needs:
        """The KL's sum and gradient, with the target in the teacher's place."""
        return replace(super().needs, target=Powers(student=self.student_power))


METHOD = Veto
