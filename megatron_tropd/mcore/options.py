"""Megatron's own options: from ``[megatron.*]`` of a config into Megatron's dataclasses."""

from collections.abc import Mapping
from typing import Any

from megatron_tropd.errors import ConfigError


def with_options[T](
    cls: type[T], own: Mapping[str, Any], options: Mapping[str, Any], *, table: str
) -> T:
    """An instance of one of Megatron's dataclasses.

    Args:
        cls: the dataclass.
        own: the fields that we set.
        options: the fields that the user set.
        table: where the user set them, for messages.

    Raises:
        ConfigError: Megatron refuses them; its sentence is in the message.
    """
    try:
        return cls(**{**own, **options})
    except Exception as error:  # Megatron's checks raise what comes to mind
        if not options:
            raise
        raise ConfigError(f"[{table}]: Megatron refuses these options: {error}") from error
