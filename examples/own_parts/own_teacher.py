"""A teacher source of your own: ``teacher.placement = "own_teacher:Indifferent"``."""

from collections.abc import Sequence
from typing import Any

from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import LogitsSignal
from megatron_tropd.teacher import TeacherStart


class Indifferent:
    """A teacher to whom all tokens are alike: log p = -log V."""

    signal = LogitsSignal

    def __init__(self, start: TeacherStart) -> None:
        self._last = start.layout.is_last_stage
        self._columns = start.padded_vocab_size // start.layout.tp_size
        self._real = start.vocab_size
        self._seen: list[int] = []

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Take note of a step's sequences; a source elsewhere would begin to score them."""
        self._seen.append(len(sequences))

    def signals(self, batches: Sequence[Any]) -> list[LogitsSignal]:
        """Give this rank's columns of the logits, [T, V/TP] for each micro-batch."""
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
        """Say what was seen."""
        print(f"sequences of each step: {self._seen}", flush=True)
