"""JSON-lines files that grow batch by batch, survive a kill, and are never mixed.

The first line is a header that says how the file is made; the others are records, each with a key.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import parse_json_line


class ResumableLines:
    """A file this process alone appends to; knows which records it has.

    A batch is on disk before :meth:`append` returns. What a kill can leave is a torn last line, and
    that is dropped when the file is opened again.
    """

    def __init__(
        self,
        path: str | Path,
        header: Mapping[str, Any],
        *,
        key: Sequence[str],
        resume: bool = True,
    ) -> None:
        """Open or make the file; repair its end; compare its header.

        Args:
            path: the file; made, with its folder, if absent.
            header: JSON-ready; those of ``"settings"`` are compared one by one.
            key: names of the integers that tell records apart.
            resume: continue an existing file; False: an existing file is an error.

        Raises:
            InputError: the file exists and may not be continued, was made with other settings, is
                broken before its last line, or is being written by another process.
        """
        self.path, self._key = Path(path), tuple(key)
        self.done: set[tuple[int, ...]] = set()
        """Keys of the records in the file."""
        if self.path.exists() and not resume:
            raise InputError(
                f"{path} exists. Continue it (resume), remove it, or name another file."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._take_up(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records in one piece and wait until they are on disk."""
        self._write(records)
        self.done.update(self._key_of(record) for record in records)

    def close(self) -> None:
        """Close the file and release it to other processes."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another process is writing {self.path}. Wait for it or name another file."
            ) from None

    def _take_up(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        end = number = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                if number == 1 and not line_of(header).startswith(line):
                    raise _not_ours(self.path)
                number -= 1
                break
            end += len(line)
            record = _parse(line, self.path, number)
            if number == 1:
                _check_header(record, header, self.path)
            else:
                self.done.add(self._key_of(record))
        self._file.truncate(end)
        if not number:
            self._write([header])

    def _key_of(self, record: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(record.get(name, -1) for name in self._key)

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(map(line_of, records)))
        self._file.flush()
        os.fsync(self._file.fileno())


def line_of(record: Mapping[str, Any]) -> bytes:
    """Make a line of a record, its end included."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _not_ours(path: Path) -> InputError:
    return InputError(
        f"{path} is another file: it does not begin as what is to be written there. Name a new one."
    )


def recorded_settings(path: Path) -> dict[str, Any]:
    """Read the settings that a file to be continued was made with; {} if it names none (yet).

    Whether it may be continued, :class:`ResumableLines` says.
    """
    with suppress(OSError, ValueError), path.open("rb") as file:
        header = json.loads(file.readline())
        settings = header.get("settings") if isinstance(header, dict) else None
        return settings if isinstance(settings, dict) else {}
    return {}


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = parse_json_line(line, f"{path}, line {number}")
    except InputError as error:
        if number == 1:
            raise _not_ours(path) from None
        raise InputError(f"{error} Cut the file off before that line to continue it.") from None
    if number == 1 and not isinstance(value.get("settings"), dict):
        raise _not_ours(path)
    return value


def _check_header(found: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    mine = {**expected, **expected["settings"]}
    theirs = {**found, **found["settings"]}
    differing = [
        f"{name}: {theirs.get(name)!r} in the file, {mine[name]!r} asked for"
        for name in mine
        if name != "settings" and theirs.get(name) != mine[name]
    ]
    if differing:
        raise InputError(
            f"{path} was made with other settings ({'; '.join(differing)}). Name another file, or "
            "use the same settings to continue it."
        )
