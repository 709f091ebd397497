"""What a rank tells of a step: the seconds of its phases, and the memory it took."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_tropd.base.progress import Progress, failed_in


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self, progress: Progress) -> None:
        """Start the first step; ``progress`` is told every phase."""
        self._progress = progress
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``; an error in it carries the phase."""
        start, outer = time.perf_counter(), self._progress.enter(phase)
        try:
            yield
            # Not after an error: a broken device would raise here and hide the cause.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except BaseException as error:
            failed_in(error, phase)
            raise
        finally:
            self._seconds[phase] += time.perf_counter() - start
            self._progress.enter(outer)

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, by phase and in total; starts the next."""
        now = time.perf_counter()
        lap = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        lap["seconds_total"] = now - self._start
        self._seconds.clear()
        self._start = now
        return lap


def peak_memory_gib() -> float:
    """Peak device memory of this rank; without CUDA its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
