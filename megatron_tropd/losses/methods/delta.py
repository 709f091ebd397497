"""Delta distillation, what training has changed in the teacher as reward: arXiv 2607.15161."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.config.loss import Powers
from megatron_tropd.losses.methods._reference import Referenced


@dataclass(frozen=True, kw_only=True)
class Delta(Referenced):
    """The reward log p - log p_ref."""

    @property
    def powers(self) -> Powers:
        """Those of q p / p_ref."""
        return Powers(teacher=1, reference=-1, student=1)


METHOD = Delta
