"""Compare the methods: the same tasks, budgets and grids for all, several seeds, intervals.

    python benchmarks/study.py --out benchmarks/results/study-cpu-2core-amd-epyc.jsonl
    python benchmarks/study.py --out ... --table > docs/study-tables.md

The first command makes the runs that its file has no line for: first those that choose each
method's learning rate, on a seed of their own, then those that are reported. It can be interrupted
at any time and started any number of times, on several machines that share ``--out`` and
``--runs``: a run belongs to whoever holds the lock of its folder, and an interrupted one resumes.
A run takes one core and one to three minutes.
"""

import argparse
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step import commit, describe_hardware
from study_runs import STEPS, TASKS, Run, grid, in_order

AT_THE_END = STEPS // 10
"""Steps over which values of the end are averaged."""


def measured(run: Run, folder: Path) -> dict[str, Any]:
    """The line of a complete run."""
    task = TASKS[run.task]
    steps = _lines(folder / "metrics.jsonl")
    value = "accuracy" if task.larger_is_better else "reverse_kl"
    evaluations = [
        (line["step"], line[value])
        for line in _lines(folder / "evaluations.jsonl")
        if line.get("model", "student") == "student"
    ]
    last, half = steps[-AT_THE_END:], steps[len(steps) // 2 :]
    tokens = [step["tokens_student"] + step["tokens_teacher"] for step in steps]
    norms = [step["grad_norm"] for step in half]
    return {
        **asdict(run),
        "curve": sorted({step: value for step, value in evaluations}.items()),
        "tokens": sum(tokens),
        "tokens_to_goal": _tokens_to(evaluations, tokens, task.goal, task.larger_is_better),
        "reverse_kl": statistics.fmean(step["reverse_kl"] for step in last),
        "outlier_share_first": steps[0]["outlier_share"],
        "outlier_share": _mean(step["outlier_share"] for step in last),
        "tv_first": steps[0]["tv"],
        "grad_norm": statistics.fmean(norms),
        "grad_norm_variation": statistics.stdev(norms) / statistics.fmean(norms),
        "response_length": statistics.fmean(step["response_length"] for step in last),
    }


def _mean(values: Iterator[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return statistics.fmean(given) if given else None


def _tokens_to(
    curve: list[tuple[int, float]], tokens: list[int], goal: float, larger: bool
) -> int | None:
    """Loss tokens until the measure crosses ``goal``, between evaluations by a line."""
    sign = 1 if larger else -1
    spent = [0]
    for count in tokens:
        spent.append(spent[-1] + count)
    before: tuple[int, float] | None = None
    for step, value in sorted(curve):
        if sign * value >= sign * goal:
            if before is None:
                return spent[step]
            share = (goal - before[1]) / (value - before[1])
            return round(spent[before[0]] + share * (spent[step] - spent[before[0]]))
        before = step, value
    return None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Results:
    """A file of JSON lines, one for each run, that several processes append to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[Run, dict[str, Any]]:
        """Run -> its line."""
        lines = _lines(self._path) if self._path.exists() else []
        names = ("task", "method", "lr", "seed")
        return {Run(**{name: line[name] for name in names}): line for line in lines}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line whole."""
        with self._path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line) + "\n")


def chosen_rates(lines: dict[Run, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(task, method) -> the rate with the best last value, where the whole grid is there."""
    best: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in grid():
        if run in lines:
            sign = 1 if TASKS[run.task].larger_is_better else -1
            value = sign * lines[run]["curve"][-1][1]
            best.setdefault((run.task, run.method), []).append((value, run.lr))
    return {of: max(found)[1] for of, found in best.items() if len(found) == len(TASKS[of[0]].lrs)}


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may make the run of ``folder``; nobody else does until the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def make(run: Run, folder: Path, results: Results) -> bool:
    """Make one run and add its line, unless somebody else does; whether it was made here."""
    with _claimed(folder) as mine:
        if not mine or run in results.read():
            return False
        config = folder.with_suffix(".toml")
        config.write_text(run.toml(folder))
        command = [sys.executable, "-m", "megatron_tropd.cli", "distill", str(config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with folder.with_suffix(".log").open("a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if code:
            print(f"{run.key}: exit code {code}, see {folder.with_suffix('.log')}", flush=True)
            return False
        hardware = describe_hardware()[1]
        results.add(measured(run, folder) | {"commit": commit(), "hardware": hardware})
        shutil.rmtree(folder)
        print(f"{run.key}: done", flush=True)
        return True


def work(results: Results, runs: Path, tasks: list[str]) -> None:
    """Make runs until none is left that nobody else makes."""
    tried: set[Run] = set()
    while True:
        lines = results.read()
        wanted = in_order(chosen_rates(lines))
        left = [r for r in wanted if r not in lines and r not in tried and r.task in tasks]
        if not left:
            return
        tried.add(left[0])
        make(left[0], runs / left[0].key, results)


def main() -> None:
    """Parse, then run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="scratch")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    args = parser.parse_args()
    results = Results(args.out)
    if args.table:
        from study_tables import tables

        print(tables(results.read()))
        return
    for name in args.tasks:
        if missing := TASKS[name].missing():
            raise SystemExit(
                f"{name}: {', '.join(missing)} not in {TASKS[name].folder}: make them first "
                "(README.md there)."
            )
    work(results, args.runs.resolve(), args.tasks)


if __name__ == "__main__":
    main()
