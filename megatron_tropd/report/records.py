"""Reading a run folder: what the training loop wrote, as plain records.

Needs only the standard library, so a report can be made if nothing is installed.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import parse_json_line, read_json_object
from megatron_tropd.config import read_settings


@dataclass(frozen=True)
class RunRecords:
    """Everything a report shows."""

    folder: Path
    config: dict[str, Any]
    """``config.json``: the resolved settings, by section."""
    metrics: list[dict[str, Any]]
    """``metrics.jsonl``: one flat record a step, ascending."""
    evaluations: list[dict[str, Any]]
    """``evaluations.jsonl``: step, model, accuracy, confidence interval, total."""
    summary: dict[str, Any]
    """``summary.json``; empty while the run is unfinished."""
    trajectories: dict[int, list[dict[str, Any]]]
    """Step -> example trajectories with per-token values."""


def read_run(folder: str | Path) -> RunRecords:
    """Read a run folder, finished or not.

    Returns:
        Its records; parts that were not written yet are empty.

    Raises:
        InputError: no such folder, no ``config.json`` in it, or a file that is not JSON.
        ConfigError: ``config.json`` is no run's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a run folder: expected config.json in it, found none. "
            "Give the run.dir of a run that `tropd distill` has started."
        )
    summary = folder / "summary.json"
    return RunRecords(
        folder=folder,
        config=read_settings(folder / "config.json"),
        metrics=read_lines(folder / "metrics.jsonl"),
        evaluations=read_lines(folder / "evaluations.jsonl"),
        summary=read_json_object(summary) if summary.is_file() else {},
        trajectories={
            int(path.stem.removeprefix("step_")): read_lines(path)
            for path in sorted((folder / "trajectories").glob("step_*.jsonl"))
        },
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none if it is absent, a torn last line is left out.

    Raises:
        InputError: a complete line is not a JSON object (file and line number named).
    """
    if not path.is_file():
        return []
    # A line without its newline was cut off while it was written.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [parse_json_line(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]


def finite(value: Any) -> Any:
    """``value`` with nan and infinities replaced by None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
