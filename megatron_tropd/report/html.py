"""One self-contained HTML page per run: no network, no library, light and dark.

Python gathers and thins the numbers; ``page.js`` draws them as SVG; ``page.css`` says how they
look. All text of the run reaches the page as data, never as markup.

Curves are drawn by about 210 of the script's 660 lines. Plotting libraries that fit into an offline
page were measured with a run of 600 steps, whose page has 0.33 MB (8 ms to compile its script):
Bokeh 3.10 makes 1.67 MB of the curves alone (177 ms), takes 7 s to import and build them, and
brings 8 packages. Vega by Altair 6.3 brings 0.90 MB of script (159 ms), a shared library of 88 MB,
and evaluates expressions, which the page forbids. Plotly's script has 4.8 MB. Either would replace
those lines by some 100 and take the themes and the crosshair through all charts along.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_tropd.report.records import RunRecords, finite, read_run
from megatron_tropd.report.summary import gap_closed
from megatron_tropd.report.timeline import page_timeline

REPORT = "report.html"
MAX_POINTS = 600
"""Points of a curve; longer runs are averaged over equal stretches of steps."""
MAX_DUMPS = 9
"""Trajectory dumps on the page: the first, the last, and evenly spaced ones between them."""
MAX_TOKENS = 16_384
"""Tokens kept of one trajectory; the page shows some hundred of them at a time."""
MAX_PAGE_TOKENS = 300_000
"""Tokens of all trajectories, about 15 MB. Longer ones leave room for fewer dumps, at least two."""
MAX_ANSWERS = 8
"""Held-out answers shown: those of the first problems in the file, so that none is picked."""
MAX_CHARACTERS = 65_536
"""Characters shown of one answer."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>megatron_tropd report</title>
<style>
{css}
</style>
</head>
<body>
<main id="page"><noscript>This report draws its curves with JavaScript.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder, finished or not.

    Returns:
        Path of the page. It replaces an older one at once, never half-written.

    Raises:
        InputError: not a run folder, or one of its files is not readable.
    """
    records = read_run(run_dir)
    page = render(page_data(records))
    path = records.folder / REPORT
    partial = path.with_name(f"{REPORT}.{os.getpid()}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def render(data: dict[str, Any]) -> str:
    """The page as text, with ``data`` (of :func:`page_data`) embedded."""
    folder = resources.files("megatron_tropd.report")
    # "<" never appears inside the data, so no text of the run can end the script element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.format(
        css=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        data=text,
    )


def page_data(records: RunRecords) -> dict[str, Any]:
    """What the page shows, thinned to a size a browser likes.

    Returns:
        JSON-ready dictionary; non-finite numbers are None.
    """
    metrics = thin(records.metrics, MAX_POINTS)
    steps = sorted(records.trajectories)
    return finite(
        {
            "name": records.folder.resolve().name,
            "method": method_name(records.config.get("loss", {})),
            "config": records.config,
            "summary": records.summary,
            "timeline": page_timeline(records.folder),
            "gap_closed": gap_closed(records.summary),
            "columns": {
                name: _rounded([row.get(name) for row in metrics]) for name in _names(metrics)
            },
            "buckets": bucket_labels(max(map(_num_buckets, metrics), default=0)),
            "evaluations": [_without_examples(record) for record in records.evaluations],
            "answers": held_out_answers(records.evaluations),
            "dumps": [
                {"step": step, "items": [_shorten(item) for item in records.trajectories[step]]}
                for step in _spread(steps, _num_dumps(records.trajectories))
            ],
        }
    )


def method_name(loss: dict[str, Any]) -> str:
    """Short name of a loss configuration, as the report's title calls it."""
    method = str(loss.get("method", "tropd"))
    title = {
        "tropd": "TrOPD",
        "static": f"Static region, tau {loss.get('tau')}",
        "opd": "OPD (no trust region)",
    }.get(method, method)
    outlier = loss.get("outlier")
    if outlier == "forward_kl":
        outlier = f"top-{loss['top_k']} forward KL"
    return title if outlier is None else f"{title}, outliers: {outlier}"


def bucket_labels(count: int) -> list[str]:
    """Names of the position buckets of ``acceptance_by_position``: 0-7, 8-15, 16-31, 32-63, ..."""
    edges = [0, *(8 * 2**i for i in range(count))]
    return [f"{low}-{high - 1}" for low, high in pairwise(edges)]


def held_out_answers(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same problems before and after.

    Args:
        evaluations: records whose ``examples`` hold prompt_index, prompt, answer, response,
            correct.

    Returns:
        For each problem ``set`` (if it has a name), prompt, answer and, where there is one,
        the ``response`` and ``correct`` of ``before`` and ``after`` (first and last of the student)
        and ``teacher``.
    """
    by_set: dict[str, list[dict[str, Any]]] = {}
    for record in evaluations:
        by_set.setdefault(record.get("set", ""), []).append(record)
    most = max(1, MAX_ANSWERS // max(1, len(by_set)))
    return [a for name, mine in by_set.items() for a in _answers_of_set(name, mine)[:most]]


def _answers_of_set(name: str, evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    student = [record for record in evaluations if record.get("model") == "student"]
    teacher = [record for record in evaluations if record.get("model") == "teacher"]
    columns = {"before": student[:1], "after": student[1:][-1:], "teacher": teacher[-1:]}
    problems: dict[int, dict[str, Any]] = {}
    for column, records in columns.items():
        for example in (e for record in records for e in record.get("examples", ())):
            named = {"set": name} if name else {}
            shown = named | {"prompt": example["prompt"], "answer": example["answer"]}
            problem = problems.setdefault(example["prompt_index"], shown)
            response = example["response"][:MAX_CHARACTERS]
            problem[column] = {"response": response, "correct": example["correct"]}
    return [problems[index] for index in sorted(problems)]


def _without_examples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "examples"}


def thin(metrics: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Average stretches of consecutive steps so that at most ``most`` records remain.

    Each keeps the last ``step`` of its stretch; None does not take part in a mean.
    """
    stride = math.ceil(len(metrics) / most) if metrics else 1
    if stride <= 1:
        return list(metrics)
    return [_mean(metrics[i : i + stride]) for i in range(0, len(metrics), stride)]


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    averaged: dict[str, Any] = {}
    for name in _names(rows):
        values = [row[name] for row in rows if row.get(name) is not None]
        if name == "step":
            averaged[name] = values[-1]
        elif values and isinstance(values[0], list):
            width = max(map(len, values))
            columns = [[v[i] for v in values if i < len(v)] for i in range(width)]
            averaged[name] = [_mean_of(column) for column in columns]
        else:
            averaged[name] = _mean_of(values)
    return averaged


def _mean_of(values: Sequence[Any]) -> float | None:
    numbers = [v for v in values if isinstance(v, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _num_buckets(row: dict[str, Any]) -> int:
    """Buckets up to the last that was reached."""
    shares = row.get("acceptance_by_position") or []
    return max((i + 1 for i, share in enumerate(shares) if share is not None), default=0)


def _num_dumps(trajectories: Mapping[int, Sequence[dict[str, Any]]]) -> int:
    """As many as the page has room for, if all were as long as the longest."""
    longest = max(
        (
            sum(min(len(item["tokens"]), MAX_TOKENS) for item in dump)
            for dump in trajectories.values()
        ),
        default=0,
    )
    return max(2, min(MAX_DUMPS, MAX_PAGE_TOKENS // max(longest, 1)))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _shorten(item: dict[str, Any]) -> dict[str, Any]:
    short = {
        name: value[:MAX_TOKENS] if isinstance(value, list) else value
        for name, value in item.items()
    }
    short["cut"] = max(0, len(item.get("tokens", [])) - MAX_TOKENS)
    return {name: _rounded(value, digits=4) for name, value in short.items()}


def _rounded(value: Any, digits: int = 5) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value
