"""The public API as text: names, parameters and their defaults, fields and methods.

``python -m tests.public_api --write`` renews ``tests/public_api.txt``. The difference is what
users will notice: CONTRIBUTING.md says what may be in it.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron_tropd

FILE = Path(__file__).with_suffix(".txt")
SETTINGS = {"Config"}
"""Named without their fields: settings have texts and tests of their own."""


def lines() -> list[str]:
    """Describe every public name; types are left out, as Python versions print them differently."""
    return [line for name in megatron_tropd.__all__ for line in _lines_of(name)]


def _lines_of(name: str) -> Iterator[str]:
    thing = getattr(megatron_tropd, name)
    if isinstance(thing, ModuleType):
        functions = {n: f for n, f in _public(thing) if f.__module__ == thing.__name__}
        yield from (f"{name}.{n}{_signature(f)}" for n, f in functions.items())
    elif not inspect.isclass(thing):
        yield f"{name}{_signature(thing)}"
    elif name in SETTINGS or issubclass(thing, Exception):
        yield name
    else:
        protocol = getattr(thing, "_is_protocol", False)
        yield name if protocol else f"{name}{_signature(thing)}"
        yield from (f"{name}.{n}{_signature(f)}" for n, f in _public(thing))


def _public(thing: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(vars(thing)):
        value = inspect.getattr_static(thing, name)
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not name.startswith("_") and inspect.isfunction(value):
            yield name, value


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    shown = [
        each.replace(annotation=each.empty, default=_default(each.default))
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=shown, return_annotation=signature.empty))


def _default(value: Any) -> Any:
    """Keep what prints the same in every process."""
    plain = value is inspect.Parameter.empty or isinstance(value, str | int | float | None)
    return value if plain else ...


if __name__ == "__main__":
    text = "\n".join(lines()) + "\n"
    if "--write" in sys.argv:
        FILE.write_text(text)
    else:
        print(text, end="")
