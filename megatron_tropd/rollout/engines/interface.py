"""What a run needs of its engines, wherever they are."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.weights.interface import WeightChannel


class SamplingEngines(Protocol):
    """The engines of a run, until the block is left; calls are collective.

    Engines that share devices with the trainer give their memory back after each call that
    returns samples; :meth:`awake` spares that between several calls.
    """

    @property
    def channel(self) -> WeightChannel:
        """The way of new weights to the engines."""

    def awake(self) -> AbstractContextManager[None]:
        """Keep the engines' memory until the block is left, also by an error."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request; one sample each, in order, on every rank.

        Args:
            requests: the same list on every rank.
        """

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Ask for samples of the newest weights without waiting; one call at a time."""

    def finish(self) -> list[Sample]:
        """The samples of the last :meth:`start`."""

    def arrived(self) -> list[Sample] | None:
        """The samples of the last :meth:`start`, if this rank has them all; :meth:`finish` still
        gives them. Not collective, in any thread.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None:
        """End what belongs to this rank."""
