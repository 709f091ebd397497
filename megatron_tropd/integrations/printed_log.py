"""Megatron's printed log line, with the values that Megatron leaves out of it.

``training_log`` prints an average only if it is at least zero. A log-ratio or the loss of a policy
gradient is below zero as often as above, and NaN is neither; TensorBoard and W&B get them all.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

_ADVANCED = "advanced iterations"
"""Megatron's key of the number of iterations that an average is over."""
_NEXT = " loss scale:"
"""What follows the averages in the line."""


class PrintedLog:
    """Stands in place of Megatron's ``training_log`` and of what prints its line."""

    def __init__(
        self, training_log: Callable[..., Any], print_rank_last: Callable[[str], None]
    ) -> None:
        """Wrap the two functions of ``megatron.training.training``."""
        self._log, self._print = training_log, print_rank_last
        self._signature = inspect.signature(training_log)
        self._sums: dict[str, Tensor] | None = None
        self._count = 1

    def training_log(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, knowing beforehand what it is about to average."""
        given = self._signature.bind(*args, **kwargs).arguments
        skipped = int(given["skipped_iter"])
        total = given["total_loss_dict"]
        self._count = max(1, total.get(_ADVANCED, 0) + 1 - skipped)
        self._sums = _sums(total, {} if skipped else given["loss_dict"])
        try:
            return self._log(*args, **kwargs)
        finally:
            self._sums = None

    def print_rank_last(self, message: str) -> None:
        """Megatron's, with the missing averages where the others stand."""
        if self._sums is not None and " iteration " in message:
            averages = {key: value.item() / self._count for key, value in self._sums.items()}
            missing = {key: value for key, value in averages.items() if not value >= 0.0}
            message = _with(message, missing)
            self._sums = None
        self._print(message)


def _sums(total: Mapping[str, Any], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Megatron will divide: its sums so far, some of which count iterations, and the new."""
    sums = {key: value for key, value in total.items() if isinstance(value, Tensor)}
    return sums | {key: sums[key] + value if key in sums else value for key, value in new.items()}


def _with(line: str, averages: Mapping[str, float]) -> str:
    shown = "".join(f" {key}: {value:.6E} |" for key, value in averages.items())
    before, mark, after = line.partition(_NEXT)
    return f"{before}{shown}{mark}{after}"
