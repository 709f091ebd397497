"""Settings that check themselves: every field against its annotation. Standard library only.

A dataclass of settings comes from TOML, from JSON, from Python or from ``replace``; wherever it
comes from, it is checked when it is made, so nothing that a reader of TOML would refuse can enter
by another door.
"""

import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from megatron_tropd.base.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Where a number may lie; given in its annotation: ``Annotated[int, Range(1)]``."""

    least: float = -math.inf
    most: float = math.inf
    ends: Literal["[]", "(]", "[)", "()"] = "[]"
    """Whether an end belongs to the range, as in mathematics."""
    hint: str = ""
    """What to do, if the range alone does not say it."""

    def __contains__(self, value: float) -> bool:
        above = value >= self.least if self.ends[0] == "[" else value > self.least
        below = value <= self.most if self.ends[1] == "]" else value < self.most
        return above and below and _is_finite(value)

    def __str__(self) -> str:
        if self.least == -math.inf and self.most == math.inf:
            return "a number"
        if self.most == math.inf:
            if self.ends[0] == "(":
                return f"above {self.least:g}"
            return f"at least {self.least:g}"
        if self.ends == "()":
            return f"strictly between {self.least:g} and {self.most:g}"
        return f"in {self.ends[0]}{self.least:g}, {self.most:g}{self.ends[1]}"


Count = Annotated[int, Range(1)]
Number = Annotated[int, Range(0)]
Anything = Annotated[int, Range()]
"""Any whole number, such as a seed."""
Finite = Annotated[float, Range()]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
Share = Annotated[float, Range(0, 1, "(]")]
Between = Annotated[float, Range(0, 1, "()")]


class Settings:
    """Base of the frozen dataclasses that hold what somebody chose.

    Types, names of a ``Literal`` and ranges of numbers are checked here; a number is finite, and
    says in its annotation where it may lie. What several fields say together, a class checks in
    :meth:`_check_together`.

    ``class TrainConfig(Settings, section="train")`` is called ``train.lr`` in messages.
    """

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, *, section: str = "", **others: Any) -> None:
        """Remember the section; refuse a class that would not be checked."""
        super().__init_subclass__(**others)
        if "__post_init__" in vars(cls):
            raise TypeError(f"{cls.__name__}: write _check_together, for __post_init__ is taken.")
        if section:
            cls._prefix = f"{section}."

    @classmethod
    def class_of(cls, table: dict[str, Any]) -> "tuple[type[Settings], dict[str, Any]]":
        """The class that a table of TOML or JSON describes, and its fields there.

        Itself, unless the table names one of several.
        """
        return cls, table

    def __post_init__(self) -> None:
        """Check every field, then what they say together; raises ConfigError."""
        for name, hint in hints_of(type(self)).items():  # type: ignore[arg-type]
            self._check_field(name, hint)
        self._check_together()

    def key(self, name: str) -> str:
        """Return what messages call a field: the key of TOML."""
        return self._prefix + name

    def _check_field(self, name: str, hint: Any) -> None:
        check_value(hint, getattr(self, name), self.key(name))

    def _check_together(self) -> None:
        """Raise ConfigError if fields do not go together."""


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field of a dataclass -> its annotation, ranges included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def check_value(hint: Any, value: Any, where: str) -> None:
    """Check a value against an annotation.

    Args:
        hint: int, float, str, ..., Literal, Annotated with a :class:`Range`, ``X | None``, tuple,
            dict, or a class.
        value: what was given.
        where: how messages call it.

    Raises:
        ConfigError: says what was expected and what was found.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_type(args[0], value, where)
        for given in args[1:]:
            check_range(given, value, where)
    elif origin in (types.UnionType, typing.Union):
        if value is not None or type(None) not in args:
            check_value(next(a for a in args if a is not type(None)), value, where)
    elif origin is Literal:
        _check_choice(args, value, where)
    elif origin is tuple:
        _check_tuple(args, value, where)
    elif origin is dict:
        table = "a table such as {key = value}"
        _check(isinstance(value, dict), f"{where} must be {table}, {_found(value)}.")
        for key, item in value.items():
            check_value(args[0], key, f"a key of {where}")
            check_value(args[1], item, f"{where}.{key}")
    elif hint is not Any:
        _check_type(origin or hint, value, where)
        if hint is float:
            check_range(Range(), value, where)


def require_plain(value: Any, where: str) -> None:
    """Refuse what JSON and TOML do not both have, so that it stays what it is in every file."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check(isinstance(key, str), f"{where}: keys must be strings, found {key!r}.")
            require_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            require_plain(item, f"{where}[{number}]")
    else:
        good = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        _check(
            good,
            f"{where} must be a string, a finite number, true, false, a list or a table, found "
            f"{value!r}. Put a date in quotes; leave out what is empty.",
        )


def is_number(value: object) -> bool:
    """Whether a value is a finite number, or true or false."""
    return isinstance(value, int | float) and _is_finite(value)


def nearest(value: object, known: Iterable[object], *, likeness: float = 0.6) -> str:
    """`` Did you mean 'exact'?`` for "Exact", or nothing if nothing is near."""
    names = {str(name).lower(): name for name in known}
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=likeness)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def check_range(given: Any, value: Any, where: str) -> None:
    """Raise ConfigError if a number is outside of a :class:`Range`; what else is given is none."""
    if isinstance(given, Range):
        hint = f" {given.hint}" if given.hint else ""
        finite = "" if _is_finite(value) else " and finite"
        _check(value in given, f"{where} must be {given}{finite}, found {value}.{hint}")


def _is_finite(value: float) -> bool:
    # Not ``math.isfinite``: a whole number too large for a float is an OverflowError there.
    return abs(value) <= sys.float_info.max


def _check_choice(choices: tuple[Any, ...], value: Any, where: str) -> None:
    # True is no 1 here.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        near = nearest(value, choices, likeness=0.4) if isinstance(value, str) else ""
        raise ConfigError(f"{where} must be one of {list(choices)}, found {value!r}.{near}")


def _check_tuple(args: tuple[Any, ...], value: Any, where: str) -> None:
    kind = "tuple" if isinstance(value, list) else "list"
    _check(isinstance(value, tuple), f"{where} must be a {kind}, {_found(value)}.")
    any_number = args[-1] is Ellipsis
    _check(
        any_number or len(value) == len(args),
        f"{where} must have {len(args)} elements, found {value!r}.",
    )
    for item, hint in zip(value, args[:1] * len(value) if any_number else args, strict=True):
        check_value(hint, item, where)


def _check_type(hint: Any, value: Any, where: str) -> None:
    kinds = (int, float) if hint is float else (hint,)
    good = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    quotes = " Put it in quotes." if hint is str else ""
    _check(good, f"{where} must be {hint.__name__}, {_found(value)}.{quotes}")


def _found(value: Any) -> str:
    return f"found {value!r} ({type(value).__name__})"


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
