"""How long a rank stands at the sum of the gradients: for slower replicas, and for the sum itself.

Megatron's schedule announces that moment to its timers, so this is one of them. Nobody waits for a
GPU: its own stream takes the times.
"""

import time
from typing import Any

import torch

from megatron_tropd.mcore import platform

_OF_GRADIENTS = "all-grads-sync"
"""Megatron's name of the sum over the replicas, from a stage's last backward pass on."""


class GradientWait:
    """Megatron's ``config.timers``, of which this one is kept."""

    def __init__(self) -> None:
        """Nothing was measured."""
        self._start, self._stop = self._marks()

    def __call__(self, name: str, log_level: int | None = None) -> "GradientWait | _Ignored":
        """The timer of that name."""
        return self if name == _OF_GRADIENTS else _IGNORED

    def start(self, barrier: bool = False) -> None:
        """The last micro-batch is done."""
        self._start.record()

    def stop(self, barrier: bool = False) -> None:
        """The gradients are summed."""
        self._stop.record()

    @property
    def seconds(self) -> float:
        """Of the last step; to be asked after the device has done it."""
        return self._start.elapsed_time(self._stop) / 1e3

    @staticmethod
    def _marks() -> tuple[Any, Any]:
        if platform.has_cuda():
            return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        return _HostMark(), _HostMark()


class _HostMark:
    """A CUDA event where the host itself computes."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "_HostMark") -> float:
        """Milliseconds, as CUDA gives them."""
        return 1e3 * (end._at - self._at)


class _Ignored:
    """A timer that nobody reads."""

    def start(self, barrier: bool = False) -> None:
        """Not measured."""

    def stop(self, barrier: bool = False) -> None:
        """Not measured."""


_IGNORED = _Ignored()
