"""Whether engine and trainer compute the same model: the log-probs they give the same tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.sequence import TokenSequence

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""rollout.max_engine_gap by the models' type, if it is not set."""


class EngineGap:
    """Looks once in each start: in the first step that trains on samples of its own weights."""

    def __init__(
        self,
        limit: float | None,
        dtype: torch.dtype,
        *,
        advice: str = "",
        dropout: bool = False,
    ) -> None:
        """Nothing is compared yet.

        Args:
            limit: nats on average; 0: do not look; None: that of ``dtype``.
            advice: what to compare if the gap is larger.
            dropout: whether what is trained is another model than the engine's, by what is dropped.
                Only before the first step there is nothing yet to drop.
        """
        self._limit = LIMITS[dtype] if limit is None else limit
        self._dtype = str(dtype).removeprefix("torch.")
        self._advice = advice
        self._compared = False
        self._dropout = dropout

    def check(
        self, metrics: Mapping[str, Any], sequences: Sequence[TokenSequence], step: int
    ) -> None:
        """Stop before the optimizer if engine and trainer do not compute the same model.

        Args:
            metrics: of the step, equal on every rank.
            step: 0-based.

        Raises:
            TrainingError: the gap is above the limit.
        """
        own = all(sequence.oldest_version == step for sequence in sequences)
        if self._compared or not own or not metrics["tokens_student"]:
            return
        if self._dropout and step > 0:
            return
        self._compared = True
        gap = metrics["engine_gap_mean"]
        if self._limit == 0 or (gap is not None and gap <= self._limit):
            return
        raise TrainingError(
            f"Engine and trainer do not compute the same model: in step {step + 1} the "
            f"log-probs they give the sampled tokens differ by {_number(gap)} nats on average (at "
            f"most {_number(metrics['engine_gap_max'])}), expected at most {self._limit:g} in "
            f"{self._dtype} (rollout.max_engine_gap). The weights were not updated. {self._advice} "
            "If the difference is round-off, raise rollout.max_engine_gap."
        )


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"
