"""What a run needs of a way of weights, wherever it leads."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

NamedTensor = tuple[str, Tensor | None]
"""HF name and tensor, ``None`` but on the receivers. Making it is collective."""


@dataclass(frozen=True)
class RepeatableExport:
    """A model's tensors, made anew by everyone who goes through them."""

    make: Callable[[], Iterator[NamedTensor]]

    def __iter__(self) -> Iterator[NamedTensor]:
        return self.make()


class WeightChannel(Protocol):
    """The way of the student's weights from the training ranks to all engines of a run.

    Engines beside the ranks get them by a ``WeightTransport`` (engines/transports.py) of each rank,
    which the channel of a pool uses.
    """

    @property
    def receivers(self) -> tuple[int, ...]:
        """Ranks that need the tensors; the others are given None."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights sent last have seen; 0 before."""

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Give every engine new weights; collective.

        Args:
            tensors: exhausted on every rank. Gone through again if the same weights are sampled
                after a sleep, so no iterator for engines that sleep
                (:class:`RepeatableExport`).
            version: optimizer steps they have seen.

        Raises:
            TrainingError: they could not be sent.
        """
