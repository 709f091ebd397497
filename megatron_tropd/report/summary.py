"""The table a run ends with on the terminal."""

from collections.abc import Mapping
from typing import Any


def summary_table(summary: Mapping[str, Any]) -> str:
    """Format ``summary.json`` as a small table of aligned columns.

    Args:
        summary: ``student_before``, ``student_after``, ``teacher`` (exact match, 0..1) or the same
            with the suffix ``_reverse_kl`` (nats per token); ``unjudged`` of ``problems``;
            ``sets``: these of each set that has a name;
            ``seconds``, ``steps``, ``world_size``, ``tensor_parallel``, ``pipeline_parallel``.
            Absent ones are left out.
    """
    rows = _result_rows(summary)
    for name, of_set in summary.get("sets", {}).items():
        rows += [(f"{label}, {name}", value) for label, value in _result_rows(of_set)]
    rows += _job_rows(summary)
    if not rows:
        return "(nothing measured)"
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    rule = "─" * (left + right + 3)
    return "\n".join([rule, *(f"{name:<{left}}   {value:>{right}}" for name, value in rows), rule])


def gap_closed(summary: Mapping[str, Any]) -> float | None:
    """(after - before) / (teacher - before) of the accuracies, None if it has no meaning."""
    before, after, teacher = (
        summary.get(name) for name in ("student_before", "student_after", "teacher")
    )
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def _result_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "student_before": "student before",
        "student_after": "student after",
        "teacher": "teacher",
    }
    rows = [
        (f"{label}, exact match", f"{100 * summary[name]:.1f} %")
        for name, label in labels.items()
        if summary.get(name) is not None
    ]
    if summary.get("unjudged"):
        unjudged = f"{summary['unjudged']} of {summary['problems']}"
        rows.append(("answers after, not judged", unjudged))
    if (closed := gap_closed(summary)) is not None:
        rows.append(("gap to the teacher closed", f"{100 * closed:.0f} %"))
    rows += [
        (f"{label}, reverse KL", f"{summary[f'{name}_reverse_kl']:.3f} nats/token")
        for name, label in labels.items()
        if summary.get(f"{name}_reverse_kl") is not None
    ]
    return rows


def _job_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if summary.get("steps") is not None:
        rows.append(("steps", f"{summary['steps']}"))
    if summary.get("seconds") is not None:
        minutes, seconds = divmod(round(summary["seconds"]), 60)
        rows.append(("time", f"{minutes} min {seconds:02d} s"))
    if summary.get("world_size") is not None:
        tensor, pipeline = summary.get("tensor_parallel", 1), summary.get("pipeline_parallel", 1)
        rows.append(("ranks", f"{summary['world_size']} (TP {tensor}, PP {pipeline})"))
    return rows
