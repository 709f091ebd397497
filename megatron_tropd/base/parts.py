"""Find a part of a run by name: one of ours, or one of the user's own.

A part is an attribute of a module. Ours are the modules of one package, so that a new file in it is
all that a new part needs. ``"package.module:attribute"`` names a part that lives elsewhere.
"""

import importlib
import importlib.util
import pkgutil
from functools import cache
from typing import Any

from megatron_tropd.base.errors import ConfigError


@cache
def part_names(package: str) -> tuple[str, ...]:
    """The names of our own parts in ``package``, such as "megatron_tropd.losses.methods".

    The package itself is not imported: a login node may lack what it needs.
    """
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found else None
    return tuple(sorted(m.name for m in pkgutil.iter_modules(places) if m.name[0] != "_"))


def check_part(package: str, name: str, *, setting: str) -> None:
    """Raise ConfigError if a setting names no part of ours; one of the user's own is not sought."""
    if ":" not in name and name not in part_names(package):
        known = part_names(package)
        raise ConfigError(
            f"{setting} = {name!r}: expected one of {', '.join(known)}, or "
            '"package.module:attribute" of your own.'
        )


def load_part(package: str, name: str, *, attribute: str, setting: str) -> Any:
    """Import the part that a setting names.

    Args:
        package: where ours are.
        name: a module of it, or "package.module:attribute" of any that can be imported.
        attribute: what our modules call the part.
        setting: for the message, such as "loss.method".

    Raises:
        ConfigError: there is no such part.
    """
    check_part(package, name, setting=setting)
    module, colon, wanted = name.partition(":")
    if not colon:
        module, wanted = f"{package}.{name}", attribute
    try:
        return getattr(importlib.import_module(module), wanted)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting} = {name!r} cannot be imported: {error}. Give a module on PYTHONPATH and "
            'its attribute, as in "my_package.my_module:MyPart".'
        ) from None
