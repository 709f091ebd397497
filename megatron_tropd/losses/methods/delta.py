"""Delta distillation, what training has changed in the teacher as reward: arXiv 2607.15161."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.losses.methods._reference import Referenced


@dataclass(frozen=True, kw_only=True)
class Delta(Referenced):
    """The reward log p - log p_ref."""

    @property
    def powers(self) -> tuple[float, float, float]:
        """Those of q p / p_ref."""
        return 1.0, -1.0, 1.0


METHOD = Delta
