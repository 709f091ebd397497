"""GKD and MiniLLM's single step: a divergence at every position (sources: docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Range
from megatron_tropd.losses.method import terms
from megatron_tropd.losses.methods._whole import WholeKl

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term

JsdBeta = Annotated[float, Range(0, 1, "()", "Ask for forward_kl or reverse_kl by name.")]


@dataclass(frozen=True, kw_only=True)
class Gkd(WholeKl):
    """A divergence over the whole vocabulary."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    """KL(p||q), KL(q||p), or the generalised Jensen-Shannon divergence."""
    jsd_beta: JsdBeta = 0.5
    """Weight of the teacher in the mixture of jsd, strictly between 0 and 1."""
    teacher_tokens: Literal["nll", "same"] = "same"
    """Loss of tokens the teacher wrote: -beta log q(x), or the divergence (GKD)."""

    def _check_together(self) -> None:
        if self.jsd_beta != 0.5 and self.divergence != "jsd":
            raise ConfigError(
                f"loss.jsd_beta is read with divergence = 'jsd' only, found {self.divergence!r}. "
                "Leave it out, or choose jsd."
            )

    @property
    def needs(self) -> Needs:
        """The divergence's sums and gradient."""
        if self.divergence != "jsd":
            return super().needs
        sums = ("reward", "teacher_to_mixture")
        return Needs(sums=sums, reward="mixture", mix=self.jsd_beta)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The divergence."""
        if self.divergence != "jsd":
            return super().term(statistics, targets)
        return terms.jsd(statistics, self.jsd_beta)


METHOD = Gkd
