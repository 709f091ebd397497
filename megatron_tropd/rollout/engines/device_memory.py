"""The device's memory, of which an engine that ended gives its part back a moment later."""

import time
from collections.abc import Callable

import torch

from megatron_tropd.base.errors import TrainingError

_SLACK = 512 * 2**20
"""Bytes that may be missing: contexts and communicators of others grow meanwhile."""
_POLL_SECONDS = 0.2


def free_bytes() -> int | None:
    """What is free on this process' device; None without CUDA."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def wait_for_memory(
    before: int | None,
    who: str,
    *,
    seconds: float = 60.0,
    free: Callable[[], int | None] = free_bytes,
) -> None:
    """Wait until as much memory is free as before somebody took of it.

    Args:
        before: what :func:`free_bytes` said then.
        who: took it, and has ended.
        free: what is free now.

    Raises:
        TrainingError: it is not.
    """
    deadline = time.monotonic() + seconds
    while before is not None and (now := free()) is not None and now < before - _SLACK:
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{before / 2**30:.1f} GiB were free on the device before {who} started, and "
                f"{seconds:g} s after it ended {now / 2**30:.1f} GiB are. Something holds the "
                "rest: nvidia-smi lists the processes on the device. End what is left of an "
                "earlier run, then start again.",
                kind="device",
            )
        time.sleep(_POLL_SECONDS)
