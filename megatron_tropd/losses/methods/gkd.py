"""GKD and MiniLLM's single step: a divergence at every position (sources: docs/losses.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Range
from megatron_tropd.losses.method import Method

if TYPE_CHECKING:
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term

JsdBeta = Annotated[float, Range(0, 1, "()", "Ask for forward_kl or reverse_kl by name.")]


@dataclass(frozen=True, kw_only=True)
class Gkd(Method):
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
        if self.divergence == "forward_kl":
            sums: tuple[str, ...] = ("forward_kl",)
            return Needs(sums=sums, teacher_gradient=True)
        if self.divergence == "reverse_kl":
            return Needs(sums=("reverse_kl",), reward="log_ratio")
        sums = ("reward", "teacher_to_mixture")
        return Needs(sums=sums, reward="mixture", mix=self.jsd_beta)

    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """The divergence."""
        from megatron_tropd.losses import terms

        if self.divergence == "jsd":
            return terms.jsd(statistics, self.jsd_beta)
        if self.divergence == "forward_kl":
            return terms.forward_kl(statistics)
        return terms.reverse_kl(statistics)

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """The divergence, unless ``nll`` is asked for."""
        same = self.teacher_tokens == "same"
        return None if same else super().teacher_term(statistics, beta)


METHOD = Gkd
