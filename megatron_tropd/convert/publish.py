"""Folders that appear whole or not at all, also when the process is killed at any moment.

A folder is written beside its place under a hidden name and renamed when everything is on disk.
The hidden folder is locked while its writer lives: what a killed writer leaves is recognised by
the free lock and removed by the next one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tropd.errors import InputError


@contextmanager
def publishing(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends without an error.

    Args:
        out: the folder to make.
        force: replace an existing one, which stays until the new one is complete.

    Yields:
        The hidden folder beside ``out``.

    Raises:
        InputError: ``out`` exists and ``force`` is not given, or another process writes it.
    """
    out = out.absolute()
    claim(out, force=force)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _hidden(out, "partial")
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        _sync(partial)
        _swap(partial, out)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def claim(out: Path, *, force: bool) -> None:
    """Clean up what killed writers of ``out`` left, and refuse to write over something.

    Raises:
        InputError: ``out`` exists and ``force`` is not given, is no folder, or is being written.
    """
    _clean_up(out.absolute())
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a folder. Name another one.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} exists already. Give --force to replace it, or name another one.")


def _hidden(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def _clean_up(out: Path) -> None:
    """Remove what killed writers left; put back an old folder whose successor never came."""
    for left in sorted(out.parent.glob(f".{out.name}.partial-*")):
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process is writing {out} (in {left.name}).") from None
        finally:
            os.close(lock)
        shutil.rmtree(left)
    for left in sorted(out.parent.glob(f".{out.name}.old-*")):
        if out.exists():
            shutil.rmtree(left)
        else:
            left.rename(out)


def _swap(partial: Path, out: Path) -> None:
    old = _hidden(out, "old")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync_one(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
