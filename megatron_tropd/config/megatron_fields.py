"""Which fields of Megatron's dataclasses a config may set. Standard library only.

``megatron_fields.txt`` gives the verdict on every field. A file of such lists has ``[header]``
lines, names below them, and comments that ``#`` begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from megatron_tropd.base.errors import ConfigError

Table = Literal["model", "optimizer", "ddp", "teacher"]
_RANGES = {"at least 1", "above 0", "from 0 to 1"}
_NO_BACKWARD = "the teacher has no backward pass"


@dataclass(frozen=True)
class Verdict:
    """What a config may do with a field of Megatron's."""

    kind: Literal["passes", "set", "refused"]
    text: str = ""
    """Who sets it, or why it is refused."""
    student: bool = False
    """Whether the teacher is refused it."""
    may_change: bool = False
    """Whether a run that resumes may have another value."""
    needs: str = ""
    """What the machine must have: "CUDA" or "Transformer Engine"; empty: nothing."""
    switch: str = ""
    """Field that must be set, too, for this one to do anything; empty: none."""
    range: str = ""
    """Where its number may lie, such as "at least 1"; Megatron looks at few. Empty: anywhere."""
    choices: tuple[str, ...] = ()
    """Words that it may be, or name in a list; those that Megatron gives no type. Empty: any."""

    def check(self, where: str) -> None:
        """Raise ConfigError if it is not ``passes``."""
        if self.kind == "set":
            raise ConfigError(f"{where} is set by {self.text}: remove it here.")
        if self.kind == "refused":
            raise ConfigError(f"{where} is refused: {self.text}. Remove it.")


@cache
def verdicts(table: Table) -> dict[str, Verdict]:
    """Field -> verdict, of one table of a config."""
    if table == "teacher":
        return {name: _for_teacher(v) for name, v in verdicts("model").items()}
    found: dict[str, Verdict] = {}
    for header, names in named_lists("megatron_tropd.config", "megatron_fields.txt"):
        of_table, _, rule = header.partition(": ")
        if of_table == table:
            found |= dict.fromkeys(names, _verdict(rule))
    return found


def _verdict(rule: str) -> Verdict:
    if rule.startswith("set by "):
        return Verdict("set", rule.removeprefix("set by "))
    if rule.startswith("refused, "):
        return Verdict("refused", rule.removeprefix("refused, "))
    kind, *rest = rule.split(", ")
    words = set(rest)
    needs = next(iter(words & {"CUDA", "Transformer Engine"}), "")
    switch = next((word.removeprefix("with ") for word in rest if word.startswith("with ")), "")
    ranges = words & _RANGES
    listed = next((word.removeprefix("one of ") for word in rest if word.startswith("one of ")), "")
    student, may_change = "student" in words, "may change" in words
    known = bool(needs) + bool(switch) + student + may_change + bool(ranges) + bool(listed)
    if kind != "passes" or len(words) != known:
        raise ValueError(f"megatron_fields.txt: [{rule}] is no verdict")
    choices = tuple(listed.split())
    return Verdict("passes", "", student, may_change, needs, switch, "".join(ranges), choices)


def _for_teacher(verdict: Verdict) -> Verdict:
    return Verdict("refused", _NO_BACKWARD) if verdict.student else verdict


def may_change(table: Table, name: str) -> bool:
    """Whether a run that resumes may have another value of a field."""
    verdict = verdicts(table).get(name)
    return verdict is not None and verdict.may_change


def named_lists(package: str, name: str) -> Iterator[tuple[str, list[str]]]:
    """(header, names) of each list of a file; names under one header may stand in several."""
    header, names = "", list[str]()
    for line in files(package).joinpath(name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            if names:
                yield header, names
            header, names = line[1 : line.rindex("]")], []
        elif not line.startswith("#"):
            names += line.split()
    if names:
        yield header, names
