"""Where a rank is, how long it may stay there, and whether it was asked to stop."""

import signal
from typing import NamedTuple

from megatron_tropd.base import exits

START = "start"
"""The phase before the first step, in which models are read and engines started."""
IDLE = "waiting for the student"
"""The phase of a separate teacher's rank that has nothing to do: it may last as long as the
student's, which are timed where they are."""
LONGEST_BEAT = 10.0
"""Seconds between heartbeats (launch/watchdog.py); less if the limit is short."""


class Limits(NamedTuple):
    """Seconds until somebody gives up, each longer than the one before."""

    phase: float
    """A phase may last so long."""
    start: float
    """And :data:`START`."""
    collectives: float
    """Of every process group: later than our report, which says what is the matter."""


def limits(timeout_minutes: float) -> Limits:
    """Those of ``run.timeout_minutes``."""
    start = 120 * timeout_minutes + 300
    # Noticing takes a beat, and the report reads those of all ranks twice; see ``_watch``.
    return Limits(60 * timeout_minutes, start, start + 60 + 15 * LONGEST_BEAT)


class Progress:
    """Where this rank is; the training thread writes, the watchdog reads."""

    def __init__(self) -> None:
        """At the start."""
        self.step = 0
        """Steps done."""
        self.seconds_before = 0.0
        """That the run took before this start."""
        self.phase = START
        self.entered = 0
        """Phases entered so far."""

    def enter(self, phase: str) -> str:
        """Begin a phase; returns the one before."""
        before, self.phase = self.phase, phase
        self.entered += 1
        return before


def failed_in(error: BaseException, phase: str) -> None:
    """Write into ``error`` the phase that it ends; the innermost one stays."""
    error.__dict__.setdefault("phase", phase)


def failed_phase(error: BaseException) -> str | None:
    """Return the innermost phase that ``error`` ended; None outside of phases."""
    phase: str | None = error.__dict__.get("phase")
    return phase


class StopFlag:
    """Set by a signal that asks to stop; the loop looks at it between steps."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.signal: int | None = None
        """The first signal that came."""
        for stop in exits.STOP_SIGNALS:
            signal.signal(stop, self._set)

    @property
    def requested(self) -> bool:
        """Whether one came."""
        return self.signal is not None

    def _set(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal = number
