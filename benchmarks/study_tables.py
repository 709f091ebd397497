"""The tables of the study, from its lines: means over seeds, intervals, differences to OPD."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from study_runs import GRID_SEED, METHODS, TASKS, Run

Lines = dict[Run, dict[str, Any]]
RESAMPLES = 10_000
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom."""


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by resampling the seeds; the same for the same values."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40]


def paired(values: dict[int, float], others: dict[int, float]) -> tuple[float, float, float] | None:
    """Mean of the differences seed by seed, and Student's 95 % interval of it.

    A bootstrap of three to five differences is too narrow to call anything better.
    """
    both = [values[seed] - others[seed] for seed in values.keys() & others.keys()]
    if len(both) < 2:
        return None
    mean = statistics.fmean(both)
    half = T_975[len(both) - 1] * statistics.stdev(both) / math.sqrt(len(both))
    return mean, mean - half, mean + half


def tables(lines: Lines) -> str:
    """Markdown: for each task every method's results, in the order of the list."""
    return "\n".join(part for task in TASKS for part in _task(task, lines))


def _task(task: str, lines: Lines) -> list[str]:
    by_method = {
        method: {
            run.seed: line
            for run, line in lines.items()
            if (run.task, run.method) == (task, method) and run.seed != GRID_SEED
        }
        for method in METHODS
    }
    here = {method: found for method, found in by_method.items() if found}
    if not here:
        return []
    goal = TASKS[task].goal
    measure = "accuracy" if TASKS[task].larger_is_better else "held-out reverse KL"
    head = (
        "method",
        "lr",
        "seeds",
        f"{measure} at the end",
        "difference to OPD",
        "reverse KL at the end",
        "difference to OPD",
        "outliers at first, at the end",
        "gradient norm, variation",
        f"tokens to {goal:g}",
    )
    rows = [f"### {task}", "", _row(head), "|" + "---|" * len(head)]
    rows += [_row(_cells(method, found, here.get("OPD", {}))) for method, found in here.items()]
    return [*rows, ""]


def _cells(method: str, found: dict[int, Any], opd: dict[int, Any]) -> list[str]:
    def of(name: Callable[[Any], float]) -> tuple[dict[int, float], dict[int, float]]:
        return ({s: name(v) for s, v in found.items()}, {s: name(v) for s, v in opd.items()})

    last, last_opd = of(lambda line: line["curve"][-1][1])
    kl, kl_opd = of(lambda line: line["reverse_kl"])
    lines = list(found.values())
    first = statistics.fmean(line["outlier_share_first"] or 0 for line in lines)
    end = statistics.fmean(line["outlier_share"] or 0 for line in lines)
    norm = statistics.fmean(line["grad_norm"] for line in lines)
    variation = statistics.fmean(line["grad_norm_variation"] for line in lines)
    return [
        method,
        f"{lines[0]['lr']:g}",
        str(len(lines)),
        _mean(last),
        _difference(method, last, last_opd),
        _mean(kl),
        _difference(method, kl, kl_opd),
        f"{first:.3f}, {end:.3f}",
        f"{norm:.2f}, {variation:.2f}",
        _tokens([line["tokens_to_goal"] for line in lines]),
    ]


def _mean(values: dict[int, float]) -> str:
    low, high = bootstrap(list(values.values()))
    return f"{statistics.fmean(values.values()):.3f} ({low:.3f} to {high:.3f})"


def _difference(method: str, values: dict[int, float], others: dict[int, float]) -> str:
    found = paired(values, others) if method != "OPD" else None
    if found is None:
        return ""
    mean, low, high = found
    text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return text if low < 0 < high else f"**{text}**"


def _tokens(counts: list[int | None]) -> str:
    reached = [count for count in counts if count is not None]
    if not reached:
        return "not reached"
    share = "" if len(reached) == len(counts) else f" ({len(reached)} of {len(counts)})"
    return f"{statistics.median(reached) / 1000:.0f} k{share}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
