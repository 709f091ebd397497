"""A process that must not outlive its parent."""

import ctypes
import os
import signal

from megatron_tropd.base import exits

_SET_PDEATHSIG = 1  # of prctl


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends; end it at once if that has happened.

    The process says so itself, first of all: what the parent would run between fork and exec
    (``preexec_fn``) may meet a lock that one of its threads held.
    """
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(exits.RESTART)
