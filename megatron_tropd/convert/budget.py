"""A bound on what threads hold in memory together, set by the largest tensor, not their number."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

COPIES = 2
"""A tensor and what it is made of exist at once."""


class Budget:
    """Room for the two largest tensors, or for many small ones."""

    def __init__(self, largest: int) -> None:
        self._free = self._total = 2 * COPIES * largest
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until a tensor of ``nbytes`` has room; it leaves when the block ends."""
        wanted = min(COPIES * nbytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()
