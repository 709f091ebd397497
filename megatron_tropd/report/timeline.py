"""When each kind of rank was in which phase: of runs whose teacher has ranks of its own.

The first rank of each kind writes a line a phase; clocks of nodes are taken as equal.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tropd.report.records import read_lines

KINDS = ("student", "teacher")
SHOWN_STEPS = 6
"""Steps on the page: the last ones."""
_WAITS = "teacher"
"""The student's phase in which it does nothing but wait for states."""
_SCORES = "scoring"


class Span(NamedTuple):
    """A phase of a kind of rank; seconds of the wall clock."""

    step: int
    phase: str
    start: float
    end: float


def timeline_file(folder: Path, kind: str) -> Path:
    """Where a kind of rank writes; in a run's folder."""
    return folder / "logs" / f"timeline_{kind}.jsonl"


class Timeline:
    """Writes the phases of a rank."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Append to the file of the kind of rank in a run's ``folder``."""
        self._path = timeline_file(folder, kind)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Write when the block began and ended, if it ends well."""
        start = time.time()
        yield
        line = Span(step, name, round(start, 4), round(time.time(), 4))._asdict()
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_timeline(folder: Path) -> dict[str, list[Span]]:
    """All phases by the kind of rank; empty if the ranks are of one kind."""
    lines = {kind: read_lines(timeline_file(folder, kind)) for kind in KINDS}
    return {kind: [Span(**line) for line in found] for kind, found in lines.items() if found}


def hidden_share(spans: dict[str, list[Span]]) -> float | None:
    """Share of the teacher's scoring for which the student did not wait."""
    scored = [span for span in spans.get("teacher", []) if span.phase == _SCORES]
    waits = [span for span in spans.get("student", []) if span.phase == _WAITS]
    whole = sum(span.end - span.start for span in scored)
    seen = sum(
        max(0.0, min(one.end, wait.end) - max(one.start, wait.start))
        for one in scored
        for wait in waits
        if wait.start < one.end and one.start < wait.end
    )
    return 1 - seen / whole if whole else None


def page_timeline(folder: Path) -> dict[str, Any] | None:
    """What the page shows of it: the last steps, from 0 s on."""
    spans = read_timeline(folder)
    if len(spans) < len(KINDS):
        return None
    last = max(span.step for span in spans["student"])
    shown = {
        kind: [span for span in found if span.step > last - SHOWN_STEPS]
        for kind, found in spans.items()
    }
    zero = min(span.start for found in shown.values() for span in found)

    def seconds(moment: float) -> float:
        return round(moment - zero, 4)

    return {
        "hidden": hidden_share(spans),
        "rows": {
            kind: [[s.step, s.phase, seconds(s.start), seconds(s.end)] for s in found]
            for kind, found in shown.items()
        },
    }
