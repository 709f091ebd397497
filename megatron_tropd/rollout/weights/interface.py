"""What a run needs of a way of weights, wherever it leads."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Tensors = Iterable[tuple[str, Tensor | None]]
"""HF names and tensors, ``None`` but on the receivers. Making them is collective."""


class WeightChannel(Protocol):
    """The way of the student's weights from the training ranks to the engines."""

    @property
    def receivers(self) -> tuple[int, ...]:
        """Ranks that need the tensors; the others are given None."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights sent last have seen; 0 before."""

    def send(self, tensors: Tensors, version: int) -> None:
        """Give every engine new weights; collective.

        Args:
            tensors: exhausted on every rank. Gone through again if the same weights are sampled
                after a sleep, so no iterator for engines that sleep
                (:class:`~megatron_tropd.rollout.weights.weight_sync.Export`).
            version: optimizer steps they have seen.

        Raises:
            TrainingError: they could not be sent.
        """
