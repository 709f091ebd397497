"""Rows of prompts where they lie: JSON lines, a JSON array, Parquet, a folder or a hub's data set.

A row is read, forgotten, and read again when its prompt is due, so that a file of millions takes
the memory of their places alone. JSON is read here, by offsets. Everything else is a data set of
the library ``datasets``, which maps an Arrow copy of it into memory: Parquet itself has no way to
one row but through the whole group, which may be the whole file.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.text_files import (
    elements_of,
    is_json_array,
    lines_of,
    open_text,
    parse_json_line,
)
from megatron_tropd.config import DataConfig
from megatron_tropd.config.run import HUB

_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
"""Ends of names -> the builder of ``datasets`` that reads such files."""
_EXTRA = "pip install 'megatron-tropd[tasks]'"


class Row(NamedTuple):
    """One row, and where it is."""

    number: int
    """1-based, in the file's own unit."""
    start: int
    """Where :meth:`Rows.read` finds it."""
    size: int
    fields: dict[str, Any]


class Rows(Protocol):
    """The rows of one source."""

    unit: str
    """What ``Row.number`` counts."""

    def __iter__(self) -> Iterator[Row]:
        """Read all rows in their order."""
        ...

    def read(self, start: int, size: int) -> dict[str, Any]:
        """Read one row again."""
        ...


def open_rows(path: str | Path, data: DataConfig) -> Rows:
    """Open a source of prompts.

    Raises:
        InputError: it cannot be read, or has no such subset or split.
        ConfigError: it needs a package that is not installed, or a setting that it has not.
    """
    name = str(path)
    if name.startswith(HUB):
        return DataSetRows(name, name.removeprefix(HUB), data)
    if Path(name).is_dir():
        return DataSetRows(name, name, data)
    if data.split or data.subset:
        raise ConfigError(
            f"{name} is a single file, which has no split and no subset: remove data.split and "
            f"data.subset, or name a data set ({HUB}OWNER/NAME, or its folder)."
        )
    if builder := _SUFFIXES.get(Path(name).suffix):
        if not Path(name).is_file():
            raise InputError(f"The prompts file {name} cannot be read: there is none. Check it.")
        return DataSetRows(name, builder, data, files=name)
    return JsonRows(Path(name))


class JsonRows:
    """The objects of a file of JSON lines, or of one JSON array."""

    def __init__(self, path: Path) -> None:
        """Open a file; what is no file, such as a pipe, is copied first.

        Raises:
            InputError: it cannot be read or is of another format.
        """
        self._path = path
        with open_text(path, "prompts file") as file:
            self._file: IO[bytes] = path.open("rb") if path.is_file() else _copy(file)
        self._state = self._look()
        self.unit = "element" if is_json_array(os.pread(self._fd, 1024, 0)) else "line"

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def __iter__(self) -> Iterator[Row]:
        """Read all objects in their order."""
        self._file.seek(0)
        if self.unit == "element":
            yield from (Row(*found) for found in elements_of(self._file, str(self._path)))
            return
        for number, start, line in lines_of(self._file):
            fields = parse_json_line(line, f"{self._path}, line {number}")
            yield Row(number, start, len(line), fields)

    def read(self, start: int, size: int) -> dict[str, Any]:
        """Read one object again.

        Raises:
            InputError: the file is not what it was.
        """
        if self._look() != self._state:
            raise InputError(
                f"{self._path} was written to while it was in use: its prompts are others now. "
                "Start again, and write new prompts into a new file."
            )
        # Of no position, so that processes that share the open file do not meet.
        fields: dict[str, Any] = json.loads(os.pread(self._fd, size, start))
        return fields


def _copy(file: IO[bytes]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the rows)
    shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


class DataSetRows:
    """The rows of one split, as ``datasets`` reads it."""

    unit = "row"

    def __init__(self, name: str, source: str, data: DataConfig, files: str | None = None) -> None:
        """Open a data set.

        Args:
            name: for messages.
            source: a hub id, a folder, or the builder that reads ``files``.

        Raises:
            InputError: there is none, or it has no such subset or split.
            ConfigError: ``datasets`` is not installed, or the split must be named.
        """
        found = _load(name, source, data, files)
        if hasattr(found, "keys"):
            if len(found) > 1:
                raise ConfigError(
                    f"{name} has the splits {', '.join(found)}. Name one: data.split = "
                    f"{next(iter(found))!r} beside its path."
                )
            (found,) = found.values()
        self._rows = found

    def __iter__(self) -> Iterator[Row]:
        """Read all rows in their order."""
        for number, fields in enumerate(self._rows):
            yield Row(number + 1, number, 1, fields)

    def read(self, start: int, size: int) -> dict[str, Any]:
        """Read one row again."""
        fields: dict[str, Any] = self._rows[start]
        return fields


def _load(name: str, source: str, data: DataConfig, files: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{name} is read by `datasets` ({error}). Install it: {_EXTRA}."
        ) from None
    saved = Path(source) if files is None and name == source else None
    if name.startswith(HUB):
        print(
            f"tropd: {name} is taken from the local cache of `datasets`, or downloaded.",
            file=sys.stderr,
        )
    try:
        if saved and any((saved / n).is_file() for n in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(saved))
            return found[data.split] if data.split and hasattr(found, "keys") else found
        return datasets.load_dataset(
            source, data.subset or None, data_files=files, split=data.split or None
        )
    except Exception as error:  # the library raises whatever reading, networks and JSON do
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"{name} cannot be read by `datasets` ({type(error).__name__}: {reason}). Check its "
            "name, data.subset and data.split; without a network it must be in the local cache."
        ) from None


def shaped(
    fields: Mapping[str, Any], data: DataConfig, template: str, where: str
) -> dict[str, Any]:
    """Bring a row into the form of our own files: fields by our names, the prompt made.

    Args:
        template: ``rollout.prompt_template``.

    Raises:
        InputError: the row lacks a field that ``data.fields`` names or the template reads.
        ConfigError: the template is not valid.
    """
    made = {**fields, **{ours: _lookup(fields, n, ours, where) for ours, n in data.fields.items()}}
    for mine, other in (("prompt", "messages"), ("messages", "prompt")):
        if mine in data.fields and other not in data.fields:
            made.pop(other, None)
    return made | {"prompt": _made(template, made, where)} if template else made


def _lookup(fields: Mapping[str, Any], name: str, ours: str, where: str) -> Any:
    """The value under a name; points lead into tables and lists."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise InputError(
                f"{where}: data.fields has {ours} = {name!r}, but there is no {key!r}. Found "
                f"{sorted(value) if isinstance(value, Mapping) else repr(value)[:60]}."
            )
    return value


def _made(template: str, fields: Mapping[str, Any], where: str) -> str:
    taken = [name for name in ("prompt", "messages") if isinstance(fields.get(name), list)]
    if taken:
        raise InputError(
            f'{where}: rollout.prompt_template makes a text, but "{taken[0]}" is a list of '
            "messages. Remove the template or the messages."
        )
    try:
        return _compiled(template).render(fields)
    except jinja2.TemplateError as error:
        raise InputError(
            f"{where}: rollout.prompt_template cannot be filled ({error}). Found the fields "
            f"{sorted(fields)}."
        ) from None


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"rollout.prompt_template is not valid: {error}.") from None
