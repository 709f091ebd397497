"""The tables of the study, from its lines: means over seeds, intervals, paired differences."""

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from study_runs import (
    GRID_SEED,
    METHODS,
    STAGES,
    STEPS,
    TASKS,
    Run,
    Values,
    next_runs,
    rate,
    seeds,
)

Line = dict[str, Any]
Lines = dict[Run, Line]
Seeds = dict[int, float]
"""Seed -> value."""
RESAMPLES = 10_000
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom."""
START = "the start"
"""In the place of a method: the student before training."""
QUESTIONS = (
    ("TrOPD as published", "TrOPD, as published", "OPD"),
    ("its trust region alone, outliers left out", "TrOPD, mask", "OPD"),
    ("its forward KL on outliers", "TrOPD, no guidance", "TrOPD, mask"),
    ("trust region and forward KL", "TrOPD, no guidance", "OPD"),
    ("its guidance, on top of both", "TrOPD, as published", "TrOPD, no guidance"),
    ("guidance alone", "OPD, guidance", "OPD"),
    ("outliers clipped", "TrOPD, clip", "OPD"),
    ("clipped in place of forward KL", "TrOPD, clip", "TrOPD, no guidance"),
    ("clipped TrOPD in place of the published", "TrOPD, clip", "TrOPD, as published"),
    ("guidance, if clipped", "TrOPD, clip, guidance", "TrOPD, clip"),
    ("OPD without sampling noise", "OPD, exact", "OPD"),
    ("OPD without sampling noise against TrOPD as published", "OPD, exact", "TrOPD, as published"),
    ("OPD without sampling noise against clipped TrOPD", "OPD, exact", "TrOPD, clip"),
    ("TrOPD with the mean over the draw", "TrOPD, expected", "TrOPD, no guidance"),
    ("TrOPD without sampling noise", "TrOPD, exact", "TrOPD, no guidance"),
    ("clipped TrOPD without sampling noise", "TrOPD, exact, clip", "TrOPD, clip"),
    ("clipped TrOPD against OPD, both exact", "TrOPD, exact, clip", "OPD, exact"),
    ("TrOPD against OPD, both exact", "TrOPD, exact", "OPD, exact"),
    ("TRB's rollouts", "TRB", "TRB's loss"),
    ("TRB's rollouts against a lower temperature", "TRB", "TRB's loss, cooled"),
    ("a lower temperature", "TRB's loss, cooled", "TRB's loss"),
    ("OPSA, which asks no teacher", "OPSA", START),
    ("OPD", "OPD", START),
)
"""What is asked, the method, and what it is compared with."""


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by resampling the seeds; the same for the same values."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-RESAMPLES // 40]


def paired(values: Seeds, others: Seeds) -> tuple[float, float, float] | None:
    """Mean of the differences seed by seed, and Student's 95 % interval of it.

    A bootstrap of three to five differences is too narrow to call anything better, and two
    accuracies of whole problems may differ by the same number by chance: None.
    """
    both = [values[seed] - others[seed] for seed in values.keys() & others.keys()]
    if len(both) < 3:
        return None
    mean = statistics.fmean(both)
    half = T_975[len(both) - 1] * statistics.stdev(both) / math.sqrt(len(both))
    return mean, mean - half, mean + half


def tokens_to(
    curve: Sequence[Sequence[float]], spent: Sequence[int], goal: float, larger: bool
) -> int | None:
    """Loss tokens until the measure crosses ``goal``, between evaluations by a line."""
    sign = 1 if larger else -1
    before: tuple[float, int] | None = None
    for (_, value), tokens in zip(curve, spent, strict=True):
        if sign * value >= sign * goal:
            if before is None:
                return tokens
            share = (goal - before[0]) / (value - before[0])
            return round(before[1] + share * (tokens - before[1]))
        before = value, tokens
    return None


def of_seeds(lines: Lines, task: str, method: str) -> dict[int, Line]:
    """Seed -> line of the reported runs of a method."""
    return {
        run.seed: line
        for run, line in sorted(lines.items(), key=lambda item: item[0].seed)
        if (run.task, run.method) == (task, method) and run.seed != GRID_SEED
    }


def last_value(line: Line) -> float:
    """The task's measure at the end."""
    return line["curve"][-1][1]


def tables(lines: Lines) -> str:
    """Markdown: what has been run, the answers, and each task's results."""
    tasks = [task for task in TASKS if any(of_seeds(lines, task, method) for method in METHODS)]
    parts = [_progress(lines), _answers(lines, tasks)]
    for task in tasks:
        parts += [_results(lines, task), _way(lines, task)]
    return "\n\n".join([*parts, _rates(lines)])


def _progress(lines: Lines) -> str:
    values: Values = {}
    while left := next_runs(values):
        values |= {run: run.lr == TASKS[run.task].lrs[1] for run in left}
    reported = sum(run.seed != GRID_SEED for run in lines)
    return (
        f"{len(lines)} of about {len(values)} runs: {reported} reported, "
        f"{len(lines) - reported} for the choice of rates."
    )


def contrast(
    lines: Lines, task: str, method: str, other: str, value: Callable[[Line], float] = last_value
) -> tuple[int, tuple[float, float, float]] | None:
    """Runs and paired difference of a method to another, or to where it began."""
    here = of_seeds(lines, task, method)
    mine = {seed: value(line) for seed, line in here.items()}
    if other == START:
        theirs = {seed: line["curve"][0][1] for seed, line in here.items()}
    else:
        theirs = {seed: value(line) for seed, line in of_seeds(lines, task, other).items()}
    found = paired(mine, theirs)
    return (len(mine.keys() & theirs.keys()), found) if found else None


def verdict(found: tuple[float, float, float], larger: bool) -> str:
    """What an interval says of a difference."""
    _, low, high = found
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (low > 0) == larger else "worse"


def _answers(lines: Lines, tasks: Sequence[str]) -> str:
    rows = []
    for question, method, other in QUESTIONS:
        for task in tasks:
            if found := contrast(lines, task, method, other):
                larger = TASKS[task].larger_is_better
                rows.append(
                    [
                        question,
                        task,
                        f"{method} - {other}",
                        str(found[0]),
                        f"{_signed(found[1])} {verdict(found[1], larger)}",
                        _divergence(lines, task, method, other) if larger else "",
                    ]
                )
    head = ("what", "task", "compared", "seeds", "measure at the end", "reverse KL at the end")
    return _table("Answers", head, rows)


def _divergence(lines: Lines, task: str, method: str, other: str) -> str:
    if other == START:
        return ""
    found = contrast(lines, task, method, other, lambda line: line["reverse_kl"])
    return f"{_signed(found[1])} {verdict(found[1], larger=False)}" if found else ""


def _results(lines: Lines, task: str) -> str:
    goal, larger = TASKS[task].goal, TASKS[task].larger_is_better
    head = (
        "method",
        "lr",
        "seeds",
        f"{'accuracy' if larger else 'held-out reverse KL'} at the end",
        "difference to OPD",
        "reverse KL at the end",
        "difference to OPD",
        "total variation at first, at the end",
        "outliers drawn, at first, at the end",
        "gradient norm, variation",
        f"tokens to {goal:g}",
        f"tokens to a reverse KL of {TASKS[task].goal_kl:g}",
    )
    rows = [_result(lines, task, method) for method in _methods(lines, task)]
    return _table(f"{task[0].upper()}{task[1:]}", head, rows)


def _methods(lines: Lines, task: str) -> Iterator[str]:
    return (method for method in METHODS if of_seeds(lines, task, method))


def _result(lines: Lines, task: str, method: str) -> list[str]:
    found = list(of_seeds(lines, task, method).values())
    larger = TASKS[task].larger_is_better
    spent = [tokens_to(line["curve"], line["tokens"], TASKS[task].goal, larger) for line in found]
    drawn = found[0]["outlier_share_first"] or any(line["outlier_share"] for line in found)
    return [
        method,
        f"{found[0]['lr']:g}",
        f"{len(found)} of {len(seeds(method))}",
        _interval([last_value(line) for line in found]),
        _difference(lines, task, method, last_value),
        _interval([line["reverse_kl"] for line in found]),
        _difference(lines, task, method, lambda line: line["reverse_kl"]),
        f"{_mean(found, 'tv_first')}, {_mean(found, 'tv')}",
        f"{_mean(found, 'outlier_share_first')}, {_mean(found, 'outlier_share')}" if drawn else "",
        f"{_mean(found, 'grad_norm', 2)}, {_mean(found, 'grad_norm_variation', 2)}",
        _tokens(spent),
        _tokens([_tokens_to_kl(line, TASKS[task].goal_kl) for line in found]),
    ]


def _tokens_to_kl(line: Line, goal: float) -> int | None:
    """Of the mean of each tenth of the steps, which stands for its middle."""
    tenths = list(enumerate(line["reverse_kl_curve"]))
    spent = [round(line["tokens"][-1] * (at + 0.5) / len(tenths)) for at, _ in tenths]
    return tokens_to(tenths, spent, goal, larger=False)


def _way(lines: Lines, task: str) -> str:
    """Measure and divergence along the way."""
    windows = [*range(0, 10, 2), 9]
    methods = list(_methods(lines, task))
    first = next(iter(of_seeds(lines, task, methods[0]).values()))
    steps = [step for step, _ in first["curve"]]
    measure = "accuracy" if TASKS[task].larger_is_better else "held-out reverse KL"
    head = (
        "method",
        *(f"{measure} at step {step}" if step == 0 else str(step) for step in steps),
        *(
            f"{'reverse KL of steps ' if at == 0 else ''}{at * STEPS // 10 + 1}"
            f" to {(at + 1) * STEPS // 10}"
            for at in windows
        ),
    )
    rows = []
    for method in methods:
        found = list(of_seeds(lines, task, method).values())
        values = [[line["curve"][at][1] for line in found] for at in range(len(steps))]
        values += [[line["reverse_kl_curve"][at] for line in found] for at in windows]
        rows.append([method, *(f"{statistics.fmean(each):.3f}" for each in values)])
    return _table(f"{task[0].upper()}{task[1:]}, along the way", head, rows)


def _rates(lines: Lines) -> str:
    """The last values of the search, the chosen rate bold."""
    head = ("task", "method", "rates and what they came to")
    values = {
        run: (1 if TASKS[run.task].larger_is_better else -1) * last_value(line)
        for run, line in lines.items()
        if run.seed == GRID_SEED
    }
    rows = []
    for task, method in dict.fromkeys(of for stage, _ in STAGES for of in stage):
        best, _ = rate(task, method, values)
        tried = [
            f"**{run.lr:g}: {last_value(lines[run]):.3f}**"
            if run.lr == best
            else f"{run.lr:g}: {last_value(lines[run]):.3f}"
            for run in (Run(task, method, lr, GRID_SEED) for lr in TASKS[task].lrs)
            if run in lines
        ]
        if tried:
            rows.append([task, method, ", ".join(tried)])
    return _table("Rates", head, rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"### {title}", "", _row(head), "|" + "---|" * len(head), *map(_row, rows)])


def _mean(lines: Sequence[Line], name: str, digits: int = 3) -> str:
    given = [line[name] for line in lines if line[name] is not None]
    return f"{statistics.fmean(given):.{digits}f}" if given else "none"


def _interval(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, high = bootstrap(values)
    return f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})"


def _difference(lines: Lines, task: str, method: str, value: Callable[[Line], float]) -> str:
    found = contrast(lines, task, method, "OPD", value) if method != "OPD" else None
    if found is None:
        return ""
    text = _signed(found[1])
    return text if verdict(found[1], larger=True) == "not told apart" else f"**{text}**"


def _signed(found: tuple[float, float, float]) -> str:
    mean, low, high = found
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _tokens(counts: Sequence[int | None]) -> str:
    reached = [count for count in counts if count is not None]
    if not reached:
        return "not reached"
    share = "" if len(reached) == len(counts) else f" ({len(reached)} of {len(counts)})"
    return f"{statistics.median(reached) / 1000:.0f} k{share}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
