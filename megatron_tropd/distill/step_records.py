"""What a step keeps for its records: the sums of its metrics, and some sequences token by token."""

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import Writer
from megatron_tropd.distill.metrics import StepSums

Examples = dict[int, dict[str, list[float | None]]]
"""Sequence of the step -> name -> a value per written token, None where it carries no loss."""
EXAMPLE_VALUES = {"outlier": "outlier", "trust": "trust", "tv": "tv", "k1": "k1"}
"""Name in a file of examples -> per-token value of the loss."""


class StepRecords:
    """Takes the values of each micro-batch of a step (``step_loss.Record``)."""

    def __init__(
        self, device: torch.device, *, counted: bool, example_rows: Collection[int] = ()
    ) -> None:
        """Nothing is counted yet.

        Args:
            counted: whether this rank's sums count (one of each tensor-parallel group).
            example_rows: sequences whose per-token values are kept in :attr:`examples`.
        """
        self.sums = StepSums.zeros(device)
        self._counted = counted
        self._example_rows = frozenset(example_rows)
        self._kept: list[tuple[MicroBatch, dict[str, Tensor]]] = []

    def __call__(
        self, values: dict[str, Tensor], weights_T: Tensor, batch: MicroBatch
    ) -> dict[str, Tensor]:
        """Count one micro-batch; an empty report (see :attr:`sums`)."""
        if self._counted:
            values = values | {"selected": (weights_T != 0).float()}
            self.sums.add(values["loss"], values, batch)
            if self._example_rows.intersection(batch.rows):
                shown = {n: values[key] for n, key in EXAMPLE_VALUES.items() if key in values}
                self._kept.append((batch, shown))
        return {}

    @property
    def examples(self) -> Examples:
        """Those of this rank; waits for the device."""
        found = {}
        for batch, shown in self._kept:
            for b in [b for b, row in enumerate(batch.rows) if row in self._example_rows]:
                # The response is what has positions, from the first token that somebody wrote.
                start = int((batch.writers[b] != Writer.CONTEXT).int().argmax())
                stop = start + 1 + int(batch.response_positions[b].max())
                carries_loss = batch.loss_mask[b][start:stop].tolist()
                mine_T = batch.loss_rows == batch.rows[b]
                found[batch.rows[b]] = {
                    name: _spread(values_T[mine_T].tolist(), carries_loss)
                    for name, values_T in shown.items()
                }
        return found


def _spread(values: list[float], carries_loss: list[bool]) -> list[float | None]:
    """One entry per written token, None where it carries no loss."""
    given = iter(values)
    return [next(given) if carries else None for carries in carries_loss]
