"""Small files of a run, written whole or not at all, with patience for a file system's hiccups."""

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import TrainingError

PATIENCE = (0.2, 1.0, 3.0)
"""Seconds before the second, third and fourth attempt to write."""
READ_PATIENCE = (0.2, 1.0, 5.0, 15.0, 30.0)
"""The same before further attempts to read what a start cannot do without."""

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


def patiently(action: Callable[[], Any], path: Path) -> None:
    """Call ``action`` until it succeeds, at most four times.

    Args:
        action: writes ``path`` and may be repeated.

    Raises:
        TrainingError: the last attempt failed; kind "disk".
    """
    for pause in (*PATIENCE, None):
        try:
            action()
            return
        except OSError as error:
            if pause is None:
                raise TrainingError(
                    f"{path} cannot be written: {error.strerror or error}. Make room or mend the "
                    "file system, then give the same command again to resume from the last "
                    "complete checkpoint.",
                    kind="disk",
                ) from error
            time.sleep(pause)


def read_patiently[T](action: Callable[[], T]) -> T:
    """Call ``action`` until it can read, for about a minute.

    Raises:
        OSError: it could not read to the end; at once if there is no such file.
    """
    for pause in READ_PATIENCE:
        try:
            return action()
        except OSError as error:
            if is_missing(error):
                raise
            time.sleep(pause)
    return action()


def is_missing(error: OSError) -> bool:
    """Whether an error says that there is no such file; any other: that it could not be read."""
    return error.errno in _NOT_THERE


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on disk when this returns; a torn attempt is taken back.

    Raises:
        TrainingError: it cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0

    def append() -> None:
        with path.open("ab", buffering=0) as file:
            try:
                rest = memoryview(line.encode())
                while rest:  # a full disk takes a part
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    patiently(append, path)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old contents or all of the new ones.

    Raises:
        TrainingError: it cannot be written; the old contents are still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def replace() -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    try:
        patiently(replace, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """:func:`replace_text` with ``content`` as JSON."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


class LossyFile(io.FileIO):
    """A log: what the file system does not take is lost, and the writer goes on."""

    def write(self, data: Any) -> int:
        """Write what can be written; never an error."""
        with contextlib.suppress(OSError):
            super().write(data)
        return len(memoryview(data).cast("B"))


def never_fail_to_print() -> None:
    """Make this process' standard output and error lossy: printing raises nothing any more."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(LossyFile(descriptor, "w", closefd=False)),
            errors="backslashreplace",
            line_buffering=True,
        )
        for descriptor in (1, 2)
    )
