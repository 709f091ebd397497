"""Settings as texts show them: every field with its default and the string under it."""

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tropd.config.run import Config


@dataclass(frozen=True)
class Described:
    """One setting."""

    table: str
    """Such as "rollout"."""
    name: str
    default: str
    """As TOML writes it; "" if it must be given, "none" if nothing is the default."""
    text: str
    """What it means, on one line."""

    @property
    def key(self) -> str:
        """Its name on the command line."""
        return f"{self.table}.{self.name}"


def describe_settings() -> Iterator[Described]:
    """Describe every setting of a run in the order of the tables; not those of the methods."""
    for name, hint in typing.get_type_hints(Config).items():
        table = _table_of(hint)
        if table is not None and name != "loss":
            yield from _describe(name, table)


def _describe(table: str, cls: type) -> Iterator[Described]:
    texts, hints = _texts(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = _table_of(hints[field.name])
        if nested is not None:
            yield from _describe(f"{table}.{field.name}", nested)
        else:
            yield Described(table, field.name, _default(field), texts.get(field.name, ""))


def _table_of(hint: Any) -> type | None:
    """Find the class of settings in a type: itself, or one of a union's or tuple's."""
    found = (hint, *typing.get_args(hint))
    return next((e for e in found if isinstance(e, type) and dataclasses.is_dataclass(e)), None)


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "none"
    return json.dumps(value, default=str, ensure_ascii=False)


def _texts(cls: type) -> dict[str, str]:
    """Read the strings under the fields of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[node.target.id] = " ".join(str(after.value.value).split())
    return found
