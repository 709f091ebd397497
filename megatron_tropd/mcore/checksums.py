"""Checksums of a checkpoint's files: made of what the ranks write, checked before loading.

``checksums.json`` lies in the checkpoint's folder: ``{"algorithm": "sha256", "files": {name:
{"bytes": size, "sha256": hex digits}}}``, as ``sha256sum`` would print them.
"""

import hashlib
import json
import os
from collections.abc import Buffer, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.files import is_missing, read_patiently

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Checksum:
    """What a complete file looks like."""

    bytes: int
    sha256: str


class DigestedFile:
    """A file that is written once from its beginning, and the digest of what goes in.

    Reading it back would cost a pass over the disk, and a fault on the way there would be taken
    for what was meant.
    """

    def __init__(self, file: BinaryIO) -> None:
        """``file``: empty, open for writing."""
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Buffer) -> int:
        """Write and digest (about 1 GB/s on a core; other threads run meanwhile)."""
        with memoryview(data) as view:
            self._digest.update(view)
            self._bytes += view.nbytes
            return self._file.write(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand on what is in Python's buffer."""
        self._file.flush()

    def checksum(self) -> Checksum:
        """Of everything so far."""
        return Checksum(self._bytes, self._digest.hexdigest())


def checksum(path: Path) -> Checksum:
    """Read a file and digest it (about 1 GB/s on a core; other threads run meanwhile)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Checksum(os.fstat(file.fileno()).st_size, digest.hexdigest())


def write_checksums(folder: Path, known: dict[str, Checksum]) -> None:
    """Write ``checksums.json`` for every file in ``folder``; on disk when this returns.

    Args:
        folder: of a checkpoint that nobody writes to any more.
        known: checksums by name; files that are not in it are read here. (A client of NFS may not
            see yet what other nodes wrote.)
    """
    found = {p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS}
    names = sorted(found | known.keys())
    files = {name: asdict(known.get(name) or checksum(folder / name)) for name in names}
    with (folder / CHECKSUMS).open("w") as file:
        json.dump({"algorithm": "sha256", "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """The checksums of a checkpoint; None for one that was made without.

    Raises:
        InputError: ``checksums.json`` is damaged.
        OSError: it could not be read, though tried for a minute.
    """
    try:
        table = json.loads(read_patiently((folder / CHECKSUMS).read_bytes))
        return {name: Checksum(**entry) for name, entry in table["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{CHECKSUMS} is damaged ({error})") from None


def share(files: dict[str, Checksum], part: int, parts: int) -> list[str]:
    """The names one of ``parts`` readers checks: about as many bytes as every other."""
    return sorted(files, key=lambda name: (files[name].bytes, name), reverse=True)[part::parts]


def problems(folder: Path, files: dict[str, Checksum], names: Iterable[str]) -> list[str]:
    """What is wrong with ``names`` in ``folder``, one text per bad file.

    Raises:
        OSError: one could not be read, though tried for a minute: nothing is known of it.
    """
    return [text for name in names if (text := _problem(folder / name, files[name]))]


def _problem(path: Path, expected: Checksum) -> str | None:
    try:
        found = read_patiently(lambda: checksum(path))
    except OSError as error:
        if not is_missing(error):
            raise OSError(error.errno, error.strerror, str(path)) from error
        return f"{path.name} is missing"
    if found.bytes != expected.bytes:
        return f"{path.name} has {found.bytes} bytes, expected {expected.bytes}"
    if found.sha256 != expected.sha256:
        return f"{path.name} has other contents than were written (sha256)"
    return None
