"""Megatron's own options in a config.

What passes at all, ``megatron_fields`` says: a name that is ours or refused is found without
Megatron, on a login node. Whether the installed version has a field, and of which type,
``mcore.options`` says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.megatron_fields import Table, verdicts
from megatron_tropd.config.settings import Range, Settings, check_range, nearest, require_plain

_RANGES = {
    "at least 1": Range(1),
    "above 0": Range(0, ends="(]"),
    "from 0 to 1": Range(0, 1),
}
"""Words of ``megatron_fields.txt`` -> where a number may lie."""


@dataclass(frozen=True, kw_only=True)
class MegatronConfig(Settings, section="megatron"):
    """Options of Megatron's own, handed on as they are (docs/megatron_options.md)."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig, for the student: recomputation, offloading, FP8, experts."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of OptimizerConfig: CPU offload, precision of the states."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig: buckets, overlap of communication."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig, for the teacher, which takes nothing from model."""

    def _check_together(self) -> None:
        for table, options in self.tables():
            require_plain(options, f"megatron.{table}")
            for name in options:
                _check_verdict(table, name, options)

    @property
    def token_multiple(self) -> int:
        """What a rank's number of tokens must be a multiple of: products in 8 bits want 16, those
        in blocks (mxfp8) and in 4 bits 32.
        """
        low = any(table.get("fp8") or table.get("fp4") for table in (self.model, self.teacher))
        return 32 if low else 1

    def tables(self) -> Iterator[tuple[Table, dict[str, Any]]]:
        """Each table with its name."""
        for f in fields(self):
            yield f.name, getattr(self, f.name)  # type: ignore[misc]

    def lines(self) -> list[str]:
        """What is set, one line an option, as a command line would have it."""
        return [
            f"megatron.{table}.{name}={value!r}"
            for table, options in self.tables()
            for name, value in options.items()
        ]


def _check_verdict(table: Table, name: str, options: dict[str, Any]) -> None:
    verdict = verdicts(table).get(name)
    if verdict is None:  # unknown here: of another version, or misspelt
        return
    where, value = f"megatron.{table}.{name}", options[name]
    verdict.check(where)
    # What is no number, the types of the installed version refuse.
    if verdict.range and isinstance(value, int | float) and not isinstance(value, bool):
        check_range(_RANGES[verdict.range], value, where)
    for word in value if isinstance(value, list) else [value]:
        if verdict.choices and isinstance(word, str) and word not in verdict.choices:
            raise ConfigError(
                f"{where} must be one of {', '.join(verdict.choices)}, found {word!r}."
                f"{nearest(word, verdict.choices)}"
            )
    # One that is there and off is no mistake: a command line switches off what a file has.
    if verdict.switch and verdict.switch not in options:
        raise ConfigError(
            f"megatron.{table}.{name} does nothing without megatron.{table}.{verdict.switch}. Set "
            "that, too, or remove this one."
        )
