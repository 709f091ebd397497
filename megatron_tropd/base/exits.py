"""What the exit code of ``tropd distill`` says, to a job script and to whoever reads its log.

A code above 128 is that of a signal: the run was asked to stop, saved and left.
"""

import os
import signal
from collections.abc import Iterable

COMPLETE = 0
"""The run is complete, or was already."""
FAILED = 1
"""Training cannot go on (a loss that is not finite, unusable data): a restart fails again."""
CONFIG = 2
"""Settings, input files or arguments are unusable: nothing was started."""
RESTART = os.EX_TEMPFAIL
"""75: a node, an engine, the file system or the like broke: a restart may cure it."""

TIME_LIMIT_SIGNAL = signal.SIGUSR1
"""What a job script sends some minutes before its time is up."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, TIME_LIMIT_SIGNAL)
"""Signals after which a run saves a checkpoint and leaves."""


def stopped_by(number: int) -> int:
    """Exit code after signal ``number``: 130 Ctrl-C, 143 SIGTERM, 138 the end of a job's time."""
    return 128 + number


def is_stop(code: int) -> bool:
    """Whether ``code`` says that the run was asked to stop."""
    return code in {stopped_by(number) for number in STOP_SIGNALS}


def is_failure(code: int) -> bool:
    """Whether ``code`` says that the run broke: neither complete nor asked to stop."""
    return code != COMPLETE and not is_stop(code)


def worst(codes: Iterable[int]) -> int:
    """The code of a run whose ranks or nodes ended with ``codes``: causes before consequences."""
    failed = [code for code in codes if code != COMPLETE]
    for code in (CONFIG, FAILED, RESTART):
        if code in failed:
            return code
    return next(iter(failed), COMPLETE)
