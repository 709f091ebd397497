"""Bytes of tensors that are alive, most at a time, and who made them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 512
"""Bytes in which torch's CUDA allocator hands out memory."""
_NOTEWORTHY = 1.01
"""The makers of a peak are written down again once it has risen by so much."""


@dataclass
class Phase:
    """What happened to the memory while one part of the step ran."""

    peak: int = 0
    """Most bytes alive at a time."""
    end: int = 0
    """Bytes alive when it was over."""
    makers: Counter[str] = field(default_factory=Counter)
    """Bytes alive near the peak, by the line that made them."""


@dataclass
class _Held:
    """A storage that somebody holds."""

    reference: weakref.ref
    size: int
    maker: str
    counted: bool


class Tracker:
    """Counts each storage once, from the operation that made it until nobody holds it any more."""

    def __init__(self, maker: Callable[[], str]) -> None:
        """Count nothing yet; ``maker`` names the line that is running."""
        self.current = 0
        self.phases: dict[str, Phase] = {}
        self._maker = maker
        self._held: dict[int, _Held] = {}
        self._by_maker: Counter[str] = Counter()
        self._phase, self._noted, self._most = Phase(), 0.0, 0
        self._inside_kernel: set[int] | None = None

    def note(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return

        def forget(_: object) -> None:
            held = self._held.pop(key)
            if held.counted:
                self._add(-held.size, held.maker)

        size = -(-storage.nbytes() // BLOCK) * BLOCK
        held = _Held(weakref.ref(storage, forget), size, self._maker(), counted=False)
        self._held[key] = held
        if self._inside_kernel is None:
            self._count(held)
        else:
            self._inside_kernel.add(key)

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Count only what is left of the block: a compiled kernel keeps the rest in registers."""
        if self._inside_kernel is not None:
            yield
            return
        self._inside_kernel = set()
        try:
            yield
        finally:
            made, self._inside_kernel = self._inside_kernel, None
            for key in made:
                if key in self._held:
                    self._count(self._held[key])

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Note peak and end of the block under ``name``; the larger peak if it comes again."""
        outer, noted = self._phase, self._noted
        self._phase = self.phases.setdefault(name, Phase())
        self._noted = float(self._phase.peak)
        self._add(0, "")
        try:
            yield self._phase
        finally:
            self._phase.end = self.current
            self._phase, self._noted = outer, noted

    def forget_phases(self, *kept: str) -> None:
        """Begin anew with the peaks of all phases but ``kept``, not with what is held."""
        self.phases = {name: self.phases[name] for name in kept}

    @property
    def most(self) -> int:
        """The largest peak of all, phases or not."""
        return self._most

    def _count(self, held: _Held) -> None:
        held.counted = True
        self._add(held.size, held.maker)

    def _add(self, size: int, maker: str) -> None:
        self.current += size
        self._by_maker[maker] += size
        self._most = max(self._most, self.current)
        phase = self._phase
        if self.current > phase.peak:
            phase.peak = self.current
            if phase.peak > self._noted * _NOTEWORTHY:
                self._noted = phase.peak
                phase.makers = self._by_maker.copy()
