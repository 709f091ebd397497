"""Why a run ended: kinds of failure, what each means for a restart, and the file that says it.

``RUN/failure.json`` holds the first cause. A rank that merely lost its peers leaves it to them: a
cause that comes later replaces such a symptom. Standard library only.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_tropd.base import exits
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError

KINDS = {
    "config": exits.CONFIG,
    "input": exits.CONFIG,
    "training": exits.FAILED,
    "bug": exits.FAILED,
    "engine": exits.RESTART,
    "disk": exits.RESTART,
    "device": exits.RESTART,
    "hung": exits.RESTART,
    "killed": exits.RESTART,
    "lost_peer": exits.RESTART,
}
"""Exit code of each kind. killed: a rank by a signal nobody asked for, or a node."""

SYMPTOMS = ("lost_peer",)
"""Kinds that follow from a failure elsewhere."""

_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG),
    *(errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO),
}
_TEXTS = {
    "disk": ("No space left on device", "Read-only file system", "os error 28", "File too large"),
    "hung": (
        *("Timed out waiting", "timed out after", "Watchdog caught collective"),
        "Application timeout caused pair closure",
    ),
    "lost_peer": (
        *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
        *("Connection refused", "Socket closed", "connectFullMesh", "gloo/transport/"),
        *("NCCL error", "remote process exited"),
    ),
    "device": ("CUDA error", "uncorrectable ECC"),
}
_FAILS_AGAIN = (
    *("out of memory", "device-side assert", "illegal memory access", "illegal instruction"),
    *("misaligned address", "invalid argument", "invalid configuration argument"),
    *("invalid device ordinal", "invalid device function", "no kernel image"),
)
"""A CUDA error of a program, not of its device."""
_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # of torch.distributed


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The reason why a run ended; ``failure.json`` holds these fields."""

    kind: str
    """A key of :data:`KINDS`."""
    message: str
    """Expected, found, what to do."""
    rank: int | None = None
    """Where it happened; None: outside the ranks."""
    step: int | None = None
    """The step being trained, from 1."""
    phase: str | None = None
    """Of the step, as in the metrics (rollout, teacher, student, ...)."""
    node: str = ""
    time: str = ""
    """When it was reported, UTC."""
    exit_code: int = exits.FAILED
    """What the run's command returns: see ``exits.py``."""


def report(path: Path, failure: Failure) -> bool:
    """Write ``failure.json`` unless a cause is already there.

    Args:
        failure: node, time and exit code are filled in.

    Returns:
        Whether a failure is in the file now; False when it cannot be written.
    """
    record = asdict(failure) | {
        "node": failure.node or socket.gethostname(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit_code": KINDS[failure.kind],
    }
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        if not _place(temporary, path):
            first = read(path)
            if first is None or (first.kind in SYMPTOMS and failure.kind not in SYMPTOMS):
                temporary.replace(path)
        return True
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path) -> bool:
    """Give a file its name unless that is taken; whether it was free."""
    try:
        os.link(temporary, path)  # fails if the file exists: the first one stays
    except FileExistsError:
        return False
    except OSError:  # some network file systems have no hard links; nearly as good:
        if path.exists():
            return False
        temporary.replace(path)
    return True


def read(path: Path) -> Failure | None:
    """The failure in ``path``; None if there is none, or nothing readable."""
    try:
        return Failure(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def kind_of(error: BaseException) -> str:
    """Which of :data:`KINDS` an exception is, by its type, its errno or its words.

    The libraries below (gloo, NCCL, CUDA, safetensors) raise RuntimeErrors that only words tell
    apart; what nothing is known of is a bug, and is not tried again.
    """
    if isinstance(error, TrainingError):
        return error.kind
    if isinstance(error, ConfigError):
        return "config"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, ConnectionError):
        return "lost_peer"
    if isinstance(error, OSError) and error.errno in _DISK:
        return "disk"
    text = str(error)
    again = any(word in text for word in _FAILS_AGAIN)
    for kind, words in _TEXTS.items():
        if not again and any(word in text for word in words):
            return kind
    return "lost_peer" if type(error).__name__ in _TYPES else "bug"


def exit_code(action: Callable[[], object]) -> int:
    """Do something; its exit code, if it returns one. Errors that have names become messages."""
    try:
        code = action()
        return code if isinstance(code, int) else exits.COMPLETE
    except (ConfigError, InputError) as error:
        print(f"tropd: {error}", file=sys.stderr)
        return exits.CONFIG
    except TrainingError as error:
        print(f"tropd: {error}", file=sys.stderr)
        return KINDS[error.kind]
    except OSError as error:
        if kind_of(error) != "disk":
            raise
        print(f"tropd: {error}. Make room or mend the file system.", file=sys.stderr)
        return KINDS["disk"]
    except KeyboardInterrupt:
        return exits.stopped_by(signal.SIGINT)
