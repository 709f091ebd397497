"""Parts of a run that live outside of the package: a method and a teacher source, named in a TOML.

The rollout mode is in ``toy_episodes.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.config.loss import Needs
from megatron_tropd.config.settings import Amount
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import LogitsSignal
from megatron_tropd.losses.method import Method
from megatron_tropd.teacher import TeacherStart


@dataclass(frozen=True, kw_only=True)
class Squared(Method):
    """(log p/q)^2 / 2 of the sampled token, plus a share of KL(q||p)."""

    share: Amount = 0.5
    """Weight of the reverse KL."""

    @property
    def needs(self) -> Needs:
        return Needs(sums=("reverse_kl",), reward="log_ratio")

    def term(self, statistics: Any, targets: Any) -> Any:
        from megatron_tropd.losses import terms

        ratio_T = statistics.log_ratio_T
        term = terms.reverse_kl(statistics).scaled(ratio_T.new_full((), self.share))
        # d/d log q of (log p - log q)^2 / 2 is -(log p - log q).
        return replace(term, value_T=term.value_T + ratio_T**2 / 2, sampled_T=-ratio_T)


class Indifferent:
    """A teacher to whom all tokens are alike."""

    signal = LogitsSignal

    def __init__(self, start: TeacherStart) -> None:
        self._last = start.ranks.is_last_stage
        self._columns = start.padded_vocab_size // start.ranks.tp_size
        self._real = start.vocab_size
        self._seen: list[int] = []

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        self._seen.append(len(sequences))

    def signals(self, batches: Sequence[Any]) -> list[LogitsSignal]:
        import torch

        if not self._last:
            return []
        return [
            LogitsSignal(
                torch.zeros(len(b.loss_at), self._columns, device=b.tokens.device), self._real
            )
            for b in batches
        ]

    def close(self) -> None:
        print(f"sequences of each step: {self._seen}", flush=True)
