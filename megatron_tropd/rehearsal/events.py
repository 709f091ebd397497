"""What a step did besides computing: collectives, waits of the host, kernels; and on which line."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

_HERE = str(Path(__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
_ROOTS = {_PACKAGE: "megatron_tropd"}
_BACKWARD = "autograd"


@cache
def _place(file: str) -> str | None:
    """Our or Megatron's name of a file; None: of neither."""
    if file.startswith(_HERE):
        return None
    for root in (_PACKAGE, "/megatron/core"):
        at = file.find(root)
        if at >= 0:
            start = at + len(root) - len(Path(root).name)
            return file[start:] if root == _PACKAGE else f"megatron/core{file[at + len(root) :]}"
    return None


def line_running() -> str:
    """The innermost line of ours or Megatron's that is running, as "file:line"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = _place(frame.f_code.co_filename)
        if place is not None:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return _BACKWARD


def line_of(error: BaseException) -> str:
    """The innermost line of ours or Megatron's that an error went through."""
    found, trace = _BACKWARD, error.__traceback__
    while trace is not None:
        place = _place(trace.tb_frame.f_code.co_filename)
        if place is not None:
            found = f"{place}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@dataclass(frozen=True)
class Collective:
    """One call of a communication; equal ones are counted."""

    phase: str
    what: str
    """The operation: "allreduce", "send", ..."""
    group: str
    """What Megatron calls the group, or its ranks."""
    size: int
    """Ranks of the group."""
    bytes: int
    """Of the tensors that this rank gives, or receives if it gives none."""
    device: str
    """"cuda", or "cpu" for what travels between hosts."""


@dataclass(frozen=True)
class Wait:
    """One place where the host waits for the device; equal ones are counted."""

    phase: str
    what: str
    """The operation: "item", "nonzero", "to the host", ..."""
    line: str


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel; equal launches are counted."""

    phase: str
    what: str


@dataclass
class Events:
    """Counts of everything that happened."""

    phase: str = "between steps"
    collectives: Counter[Collective] = field(default_factory=Counter)
    waits: Counter[Wait] = field(default_factory=Counter)
    kernels: Counter[Kernel] = field(default_factory=Counter)

    def wait(self, what: str) -> None:
        """Note that the host waits here."""
        self.waits[Wait(self.phase, what, line_running())] += 1

    def kernel(self, name: str) -> None:
        """Note a launch."""
        self.kernels[Kernel(self.phase, name)] += 1

    def take(self) -> dict[str, Counter[Any]]:
        """What was counted since the last time."""
        names = ("collectives", "waits", "kernels")
        taken = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, Counter())
        return taken
