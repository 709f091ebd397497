"""Folders that appear whole or not at all, also when the process is killed at any moment.

A folder is written beside its place under a hidden name and renamed when everything is on disk.
The hidden folder is locked while its writer lives: what a killed writer leaves is recognised by
the free lock and removed by the next one.
"""

import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tropd.base.errors import InputError

_OF_A_MODEL = (
    *("config.json", "adapter_config.json", "*.safetensors*"),
    *("latest_checkpointed_iteration.txt", ".metadata"),
)


@contextmanager
def publishing(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends without an error.

    Args:
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
        _swap(partial, out, force=force)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def claim(out: Path, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Clean up what killed writers of ``out`` left, and refuse to write over something.

    Args:
        inputs: what it is made from, which must not go with the old one.

    Raises:
        InputError: ``out`` exists and ``force`` is not given, is no folder or not that of a model,
            is or holds one of the inputs, or is being written.
    """
    place = out.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise InputError(
                f"The output {out} must not be or hold the input, found {path} in it: replacing it "
                "would delete what is converted. Name another output."
            )
    _clean_up(out.absolute())
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a folder. Name another one.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} exists already. Give --force to replace it, or name another one.")
    if out.is_dir() and any(out.iterdir()) and not _holds_a_model(out):
        raise InputError(
            f"{out} holds other things than a model (none of {', '.join(_OF_A_MODEL)}), which "
            "--force does not replace. Name another output, or empty that folder yourself."
        )


def _holds_a_model(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _OF_A_MODEL)


def _hidden(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def _left(out: Path, kind: str) -> list[Path]:
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"))


def _clean_up(out: Path) -> None:
    """Remove what killed writers left; put back an old folder whose successor never came."""
    for left in _left(out, "partial"):
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process is writing {out} (in {left.name}).") from None
        finally:
            os.close(lock)
        shutil.rmtree(left)
    for left in _left(out, "old"):
        if out.exists():
            shutil.rmtree(left)
        else:
            left.rename(out)


def _swap(partial: Path, out: Path, *, force: bool) -> None:
    old = _hidden(out, "old")
    if force and out.exists():
        out.rename(old)
    try:
        partial.rename(out)  # onto nothing or an empty folder, or it fails
    except OSError as error:
        if old.exists():
            old.rename(out)
        elif error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InputError(
                f"{out} appeared while it was being made, and was left as it is. Remove it, give "
                "--force to replace it, or name another one."
            ) from None
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
