"""ExOPD, on-policy distillation with an extrapolated reward (G-OPD): arXiv 2602.12125."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.config.loss import Powers
from megatron_tropd.config.settings import Positive
from megatron_tropd.losses.methods._reference import Referenced


@dataclass(frozen=True, kw_only=True)
class Exopd(Referenced):
    """The reward l (log p - log p_ref) + (log p_ref - log q)."""

    scale: Positive = 1.25
    """l: 1 is plain OPD, less lies between reference and teacher, more goes beyond the teacher."""

    @property
    def powers(self) -> Powers:
        """Those of p^l p_ref^(1-l)."""
        return Powers(teacher=self.scale, reference=1 - self.scale)


METHOD = Exopd
