"""A run folder as a view for the terminal: progress, phases, curves, engines, the last failure.

Everything is read from the files that the run writes; the run knows nothing of it.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_tropd.base import failures
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.report.records import RunRecords

RECENT = 10
"""Steps whose median counts as now."""
SILENT = 60.0
"""Seconds without a heartbeat after which a run counts as not running."""
WIDTH = 30
"""Characters of a curve."""
CURVES = ("loss", "reverse_kl", "outlier_share", "response_length", "grad_norm")
"""Of every run; with those of tasks and teachers (:data:`_OF_PARTS`)."""
_OF_PARTS = re.compile(r"(task|teacher)/[^/]+/(reverse_kl|reward|accuracy|outlier_share)")
_MEASURED = re.compile(r"(accuracy|reverse_kl|avg@\d+|pass@\d+)(/.*)?")
_BARS = "▁▂▃▄▅▆▇█"


def view(
    records: RunRecords, beats: Sequence[Mapping[str, Any]], *, beat_age: float | None
) -> Group:
    """Make the view of a run.

    Args:
        beats: the last heartbeat of each rank.
        beat_age: seconds since the newest of them; None: there is none.
    """
    folder = RunFolder(records.folder)
    parts: list[RenderableType] = [_progress(records, beats, beat_age)]
    if records.metrics:
        parts += [_phases(records.metrics), _curves(records)]
    parts += [_engines(records, folder)]
    if failure := failures.read(folder.failure):
        where = ", ".join(
            f"{name} {value}"
            for name in ("rank", "step", "phase", "node")
            if (value := getattr(failure, name)) not in (None, "")
        )
        said = f"{failure.kind}, {failure.time}, {where}\n{failure.message}"
        parts.append(Panel(Text(said), title="last failure", border_style="red"))
    return Group(*parts)


def _progress(
    records: RunRecords, beats: Sequence[Mapping[str, Any]], beat_age: float | None
) -> RenderableType:
    steps = records.config["train"]["steps"]
    done = records.metrics[-1]["step"] if records.metrics else 0
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(str(records.folder), style="bold"), _state(records, beat_age))
    head.add_row(ProgressBar(total=steps, completed=done, width=WIDTH), f"step {done} of {steps}")
    if records.metrics and not records.summary:
        seconds = _recent(records.metrics, "seconds_total") or 0.0
        left = _duration(seconds * (steps - done))
        head.add_row(f"{seconds:.1f} s a step", f"about {left} left")
    if beats and not records.summary:
        places = [f"{beat['phase']} of step {beat['step']}" for beat in beats]
        counted = sorted({place: places.count(place) for place in places}.items())
        ranks = ", ".join(f"{count} in {place}" for place, count in counted)
        return Panel(Group(head, Text(f"ranks: {ranks}")), title="run")
    return Panel(head, title="run")


def _state(records: RunRecords, beat_age: float | None) -> Text:
    if records.summary:
        return Text("complete", style="bold green")
    if beat_age is not None and beat_age < SILENT:
        return Text("running", style="bold cyan")
    ago = "no heartbeat yet" if beat_age is None else f"no heartbeat for {_duration(beat_age)}"
    return Text(f"not running: {ago}", style="bold yellow")


def _phases(metrics: Sequence[Mapping[str, Any]]) -> RenderableType:
    names = [name for name in metrics[-1] if re.fullmatch(r"seconds_(?!total)\w+", name)]
    total = _recent(metrics, "seconds_total") or 1.0
    table = Table("phase", "seconds", "share", title=f"median of the last {RECENT} steps")
    for name in names:
        seconds = _recent(metrics, name) or 0.0
        bar = "█" * round(20 * min(1.0, seconds / total))
        table.add_row(name.removeprefix("seconds_"), f"{seconds:.2f}", bar)
    speed = _recent(metrics, "tokens_per_second")
    table.add_row("tokens per second", f"{speed:.0f}" if speed else "-", "", style="bold")
    return table


def _curves(records: RunRecords) -> RenderableType:
    metrics = records.metrics
    names = [name for name in CURVES if name in metrics[-1]]
    names += sorted(name for name in metrics[-1] if _OF_PARTS.fullmatch(name))
    table = Table("curve", "first", "now", "", title="curves")
    for name in names:
        _add_curve(table, name, [row.get(name) for row in metrics])
    student = [row for row in records.evaluations if row.get("model") == "student"]
    measured = dict.fromkeys(n for row in student for n in row if _MEASURED.fullmatch(n))
    for name in measured:
        _add_curve(table, f"held out: {name}", [row.get(name) for row in student])
    return table


def _add_curve(table: Table, name: str, values: Iterable[Any]) -> None:
    found = [float(value) for value in values if isinstance(value, int | float)]
    if found:
        table.add_row(name, f"{found[0]:.4g}", f"{found[-1]:.4g}", sparkline(found))


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a line of bars; more than fit are averaged over equal stretches."""
    count = min(len(values), WIDTH)
    edges = [i * len(values) // count for i in range(count + 1)]
    parts = [values[a:b] for a, b in pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def _engines(records: RunRecords, folder: RunFolder) -> RenderableType:
    rollout = records.config["rollout"]
    placement, count = rollout.get("placement", "colocated"), rollout.get("num_engines", 1)
    table = Table(
        "engine", "log written", title=f"{count} engine{'s' if count > 1 else ''}, {placement}"
    )
    servers = [path.stem for path in sorted(folder.servers.glob("server_*.json"))]
    for name in servers:
        table.add_row(name, "reachable")
    for path in sorted(folder.logs.glob("engine_*.log")):
        table.add_row(path.stem, f"{_duration(time.time() - path.stat().st_mtime)} ago")
    return table


def _recent(metrics: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [row[name] for row in metrics[-RECENT:] if isinstance(row.get(name), int | float)]
    return median(found) if found else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def newest(paths: Iterable[Path]) -> float | None:
    """Seconds since the newest of some files was written; None: there are none."""
    times = [path.stat().st_mtime for path in paths]
    return time.time() - max(times) if times else None
