"""What a step keeps for its records: the sums of its metrics, and some sequences token by token."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.distill.metrics import RowGroups, StepSums

Examples = dict[int, dict[str, dict[int, float]]]
"""Sequence of the step -> name -> index in the response -> value of the token. Tokens that carry no
loss have none, nor has a token that lies on another rank."""
EXAMPLE_VALUES = {"outlier": "outlier", "trust": "trust", "tv": "tv", "k1": "k1"}
"""Name in a file of examples -> per-token value of the loss."""


class StepRecords:
    """Takes the values of each micro-batch of a step (``step_loss.Record``)."""

    def __init__(
        self,
        device: torch.device,
        *,
        counted: bool,
        example_rows: Collection[int] = (),
        groups: Sequence[RowGroups] = (),
    ) -> None:
        """Nothing is counted yet.

        Args:
            counted: whether this rank's sums count (one of each tensor-parallel group).
            example_rows: sequences whose per-token values are kept in :attr:`examples`.
            groups: of the sequences, whose means are told apart: by teacher, by task.
        """
        self.sums = StepSums.zeros(device, groups)
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
        found: Examples = {}
        for batch, shown in self._kept:
            positions_T = batch.of_loss_tokens(batch.response_positions)
            for row in self._example_rows.intersection(batch.rows):
                mine_T = batch.loss_rows == row
                places = positions_T[mine_T].tolist()
                found[row] = {
                    name: dict(zip(places, values_T[mine_T].tolist(), strict=True))
                    for name, values_T in shown.items()
                }
        return found
