"""Text files that a user names: TOML, JSON, and JSON with one object on each line.

All readers of such files are here, so that a byte order mark, Windows' line ends, UTF-16, Parquet,
a compressed file or a Git LFS pointer means the same wherever it turns up. UTF-8 is read, with or
without a mark. What is something else is an error that says how to make text of it.
"""

import codecs
import itertools
import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_tropd.base.errors import ConfigError, InputError

_HEAD = 1024  # bytes that a format is told by
_BLOCK = 2**20  # bytes of an array that are read at once
_LONGEST_ELEMENT = 2**26  # characters of it that may be one broken object
_DECODER = json.JSONDecoder()
_SPACES = re.compile(r"[ \t\r\n]*")
_PARQUET = (
    "pandas converts it: python -c \"import pandas; pandas.read_parquet('{path}').to_json("
    "'{stem}.jsonl', orient='records', lines=True)\""
)
_FORMATS = (
    (b"\x1f\x8b", "compressed with gzip", "Unpack it: gunzip '{path}'"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it: unzstd '{path}'"),
    (b"\xfd7zXZ\x00", "compressed with xz", "Unpack it: unxz '{path}'"),
    (b"BZh", "compressed with bzip2", "Unpack it: bunzip2 '{path}'"),
    (b"PK\x03\x04", "a zip archive", "Unpack it: unzip '{path}'"),
    (b"PAR1", "a Parquet file", _PARQUET),
    (b"ARROW1", "an Arrow file", _PARQUET.replace("read_parquet", "read_feather")),
    # UTF-32's mark begins like UTF-16's.
    (codecs.BOM_UTF32_LE, "UTF-32 text", "Save it as UTF-8: {iconv}"),
    (codecs.BOM_UTF32_BE, "UTF-32 text", "Save it as UTF-8: {iconv}"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "Save it as UTF-8: {iconv}"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "Save it as UTF-8: {iconv}"),
)
"""(first bytes, what it is, what to do)."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def foreign_format(head: bytes, path: Path) -> str | None:
    """Say what a file is that is not UTF-8 text, and how to make text of it.

    Returns:
        The end of a sentence that starts with the file's name; None if nothing is known of it.
    """
    if head.startswith(_LFS_POINTER):
        return _lfs_pointer(head, path)
    for magic, found, remedy in _FORMATS:
        if head.startswith(magic):
            iconv = (
                f"iconv -f {found.split()[0]} -t UTF-8 '{path}' > '{path.stem}-utf8{path.suffix}'"
            )
            advice = remedy.format(path=path, stem=path.stem, iconv=iconv)
            return f"is {found}, expected UTF-8 text. {advice}."
    if b"\x00" in head[:4]:
        return (
            "begins with zero bytes, expected UTF-8 text. If an editor wrote it as UTF-16, save it "
            "as UTF-8; else give another file."
        )
    return None


def lfs_pointer(path: Path) -> str | None:
    """Say that a file is what Git LFS leaves in place of one that it has not fetched.

    Returns:
        A sentence that names the file, its size and the remedy; None: it is no pointer.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    return f"{path} {_lfs_pointer(head, path)}" if head.startswith(_LFS_POINTER) else None


def _lfs_pointer(head: bytes, path: Path) -> str:
    size = re.search(rb"^size (\d+)", head, re.MULTILINE)
    return (
        f"is a Git LFS pointer: it stands for a file of {size[1].decode() if size else '?'} bytes "
        f"that was not fetched. Run git lfs pull in {path.parent} (after git lfs install), or "
        "download the file again."
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder, as strictly as transformers and vLLM do.

    Raises:
        InputError: it is missing, cannot be read, or holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not a complete HF folder.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if foreign := foreign_format(content[:_HEAD], path):
        raise InputError(f"{path} {foreign}")
    if content.startswith(codecs.BOM_UTF8):
        raise InputError(
            f"{path} begins with a byte order mark, which transformers and vLLM do not read. "
            f"Remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' '{path}'."
        )
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. Copy it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def read_toml(
    path: Path, what: str, *, otherwise: str = "Give the path of a TOML file."
) -> dict[str, Any]:
    """Read the tables of a file of settings.

    Args:
        otherwise: what to do if it does not exist.

    Raises:
        ConfigError: it does not exist, is a folder, cannot be read, is empty, is not UTF-8 text or
            not TOML.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist. {otherwise}") from None
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read ({error.strerror}). Give the path of a TOML file."
        ) from None
    if foreign := foreign_format(content[:_HEAD], path):
        raise ConfigError(f"{what} {path} {foreign}")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not UTF-8, as TOML is: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Give the path of a TOML file, or save it as UTF-8."
        ) from None
    if not text.strip():
        raise ConfigError(f"{what} {path} is empty. {otherwise}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not valid TOML: {error}{_toml_hint(text, str(error))}"
        ) from None


def _toml_hint(text: str, error: str) -> str:
    if text.lstrip().startswith("{"):
        return ". It looks like JSON; TOML has [section] and key = value, each on its own line."
    line = re.search(r"at line (\d+)", error)
    if line and re.search(r",\s*(}|#|$)", text.splitlines()[int(line[1]) - 1]):
        return ". No comma may follow the last entry of a {table} or a value; remove it."
    return ""


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON-lines file with their line numbers; blank lines are skipped.

    Yields:
        (1-based line number, object).

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    for number, _, line in lines_with_offsets(path, what):
        yield number, parse_json_line(line, f"{path}, line {number}")


def lines_with_offsets(path: str | Path, what: str) -> Iterator[tuple[int, int, bytes]]:
    """Read the lines of a JSON-lines file that are not blank, and where they are.

    Yields:
        (1-based number, byte offset, line).

    Raises:
        InputError: the file cannot be read or is of another format.
    """
    with open_text(Path(path), what) as file:
        yield from lines_of(file)


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Read the same from an open file, at its beginning."""
    offset = 0
    for number, line in enumerate(file, start=1):
        start = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        if line[start:].strip():
            yield number, offset + start, line[start:]
        offset += len(line)


def is_json_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes holds one JSON array."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def elements_of(file: IO[bytes], where: str) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """Read the objects of the one JSON array in an open file, at its beginning.

    No more of the file is held than the longest object, and a block.

    Yields:
        (1-based number, byte offset, bytes, object).

    Raises:
        InputError: the file is no array of objects in UTF-8; names the element.
    """
    window = _Window(file, where)
    window.skip(b"[")
    for number in itertools.count(1):
        window.name = f"{where}, element {number}"
        if window.peek() == "]" and number == 1:
            break
        start = window.offset
        value = window.value()
        if not isinstance(value, dict):
            found = type(value).__name__
            raise InputError(f"{window.name}: expected a JSON object, found {found}.")
        yield number, start, window.offset - start, value
        if window.peek() != ",":
            break
        window.skip(b",")
    window.skip(b"]")
    if rest := window.peek():
        raise InputError(f"{where}: expected nothing after the array, found {rest!r}. Remove it.")


class _Window:
    """What of a file is held while its array is read."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file, self.name = file, where
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._place = "", 0
        head = file.read(len(codecs.BOM_UTF8))
        marked = head == codecs.BOM_UTF8
        self.offset = len(head) if marked else 0
        """Of the next character in the file, in bytes."""
        self._unread = b"" if marked else head

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            spaces = _SPACES.match(self._text, self._place)
            self._move(spaces.end() if spaces else self._place)
            if self._place < len(self._text) or not self._read():
                return self._text[self._place : self._place + 1]

    def skip(self, expected: bytes) -> None:
        """Pass a character; raises InputError if another one is there."""
        found = self.peek()
        if found != expected.decode():
            raise InputError(
                f"{self.name}: expected {expected.decode()!r} of the JSON array, found "
                f"{found or 'the end of the file'!r}. Write the array whole, with commas between "
                "its objects."
            )
        self._move(self._place + 1)

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._place > _LONGEST_ELEMENT or not self._read():
                    raise InputError(
                        f"{self.name}: expected a JSON object, found {error}."
                    ) from None
                continue
            self._move(end)
            return value

    def _move(self, place: int) -> None:
        self.offset += len(self._text[self._place : place].encode())
        self._place = place

    def _read(self) -> bool:
        """Hold as much again, at least a block; False: there is no more."""
        held = self._text[self._place :]
        block, self._unread = self._unread + self._file.read(max(_BLOCK, len(held))), b""
        try:
            self._text, self._place = held + self._decode(block, not block), 0
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name}: expected UTF-8, found {error}.") from None
        return bool(block)


@contextmanager
def open_text(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Open a file of UTF-8 text.

    Raises:
        InputError: it cannot be read or is of another format.
    """
    try:
        with path.open("rb") as file:
            # Looked at without seeking: the file may be a pipe.
            head = file.peek(_HEAD)[:_HEAD]
            if foreign := foreign_format(head, path):
                raise InputError(f"The {what} {path} {foreign}")
            yield file
    except OSError as error:
        raise InputError(
            f"The {what} {path} cannot be read: {error.strerror}. Check the path."
        ) from None


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """Read the object in one line of a JSON-lines file.

    Args:
        line: UTF-8.

    Raises:
        InputError: the line is not a JSON object.
    """
    try:
        # Decoded here: of bytes, json would guess UTF-16.
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected a JSON object, found {error}.{_encoding_hint(line)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected a JSON object, found {error}.{_json_hint(line.strip())}"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: expected a JSON object, found {type(value).__name__}."
            f"{_json_hint(line.strip())}"
        )
    return value


def _encoding_hint(line: bytes) -> str:
    if re.search(rb"[\x00-\x08\x0e-\x1f]", line):
        return " It is no text; give a file with a JSON object on each line."
    return " If the file is Latin-1, save it as UTF-8: iconv -f LATIN1 -t UTF-8 OLD > NEW."


def _json_hint(line: bytes) -> str:
    if re.match(rb'\[\s*([{\["]|$)', line):
        return (
            " The file holds one array; write each of its objects on a line of its own: "
            "jq -c '.[]' OLD > NEW."
        )
    if line.startswith(b"<"):
        return " It looks like a web page; download the file itself."
    if line in (b"{", b"}"):
        return " Each object must stand on one line: jq -c . OLD > NEW."
    if line.endswith(b","):
        return " Remove the comma at the end of the line."
    if re.search(rb",\s*[}\]]", line):
        return " No comma may stand before } or ]; remove it."
    if b"\r" in line:
        return " Lines end with a carriage return alone; end them with a line feed."
    if not line.startswith(b"{"):
        return " Write one on each line, with its keys in double quotes."
    return ""
