"""Compare the methods: the same tasks, budgets and grids for all, several seeds, intervals.

    python benchmarks/study.py --out benchmarks/results/study-cpu-2core-amd-epyc.jsonl
    python benchmarks/study.py --out ... --table
    python benchmarks/study.py --out ... --page docs/study.md

The first command makes the runs that its file has no line for: first those that choose each
method's learning rate, on a seed of their own, then those that are reported. It can be interrupted
at any time and started any number of times, on several machines that share ``--out`` and
``--runs``: a run belongs to whoever holds the lock of its folder, and an interrupted one resumes.
A run takes one core and one to three minutes. The others print the tables, and write them and the
plots into the page.
"""

import argparse
import fcntl
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_file, save_file
from step import commit, describe_hardware
from study_plots import drawings
from study_runs import REPOSITORY, STEPS, TASKS, Run, Values, next_runs
from study_tables import tables

MARKS = ("<!-- printed by study.py --table -->", "<!-- end -->")
"""Around the tables of docs/study.md."""
AT_THE_END = STEPS // 10
"""Steps over which values of the end are averaged."""


def measured(run: Run, folder: Path) -> dict[str, Any]:
    """The line of a complete run."""
    steps = _lines(folder / "metrics.jsonl")
    value = "accuracy" if TASKS[run.task].larger_is_better else "reverse_kl"
    curve = sorted(
        {
            line["step"]: line[value]
            for line in _lines(folder / "evaluations.jsonl")
            if line.get("model", "student") == "student"
        }.items()
    )
    last, half = steps[-AT_THE_END:], steps[len(steps) // 2 :]
    tokens = [0, *accumulate(step["tokens_student"] + step["tokens_teacher"] for step in steps)]
    norms = [step["grad_norm"] for step in half]
    return {
        **asdict(run),
        "curve": curve,
        "tokens": [tokens[step] for step, _ in curve],
        "reverse_kl": _mean(last, "reverse_kl"),
        "reverse_kl_curve": [
            _mean(steps[at : at + AT_THE_END], "reverse_kl") for at in range(0, STEPS, AT_THE_END)
        ],
        "tv_first": steps[0]["tv"],
        "tv": _mean(last, "tv"),
        "outlier_share_first": steps[0]["outlier_share"],
        "outlier_share": _mean(last, "outlier_share"),
        "grad_norm": statistics.fmean(norms),
        "grad_norm_variation": statistics.stdev(norms) / statistics.fmean(norms),
        "student_entropy": _mean(last, "student_entropy"),
        "teacher_entropy": _mean(last, "teacher_entropy"),
        "response_length": _mean(last, "response_length"),
        "seconds": round(sum(step["seconds_total"] for step in steps)),
    }


def _mean(steps: list[dict[str, Any]], name: str) -> float | None:
    given = [step[name] for step in steps if step[name] is not None]
    return statistics.fmean(given) if given else None


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


def last_values(lines: dict[Run, dict[str, Any]]) -> Values:
    """Run -> the last value of its measure, larger is better."""
    signs = {name: 1 if task.larger_is_better else -1 for name, task in TASKS.items()}
    return {run: signs[run.task] * line["curve"][-1][1] for run, line in lines.items()}


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may make the run of ``folder``; nobody else does until the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def soften(source: Path, target: Path, temperature: float) -> None:
    """Copy a model whose logits are divided by ``temperature``: its output layer is."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        copy = Path(scratch) / target.name
        shutil.copytree(source, copy)
        weights = copy / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"] /= temperature
        save_file(tensors, weights, metadata={"format": "pt"})
        with suppress(FileExistsError):  # another worker was first
            copy.rename(target)


def make(run: Run, folder: Path, results: Results) -> bool:
    """Make one run and add its line, unless somebody else does; whether it was made here."""
    with _claimed(folder) as mine:
        if not mine or run in results.read():
            return False
        config, log_file = (folder.with_name(folder.name + end) for end in (".toml", ".log"))
        config.write_text(run.toml(folder))
        task = TASKS[run.task]
        soften(
            REPOSITORY / task.folder / task.teacher, run.teacher(folder.parent), task.temperature
        )
        with log_file.open("a") as log:
            code = distill(config, log)
        if code:
            print(f"{run.key}: exit code {code}, see {log_file}", flush=True)
            return False
        hardware = describe_hardware()[1]
        results.add(measured(run, folder) | {"commit": commit(), "hardware": hardware})
        shutil.rmtree(folder)
        print(f"{run.key}: done", flush=True)
        return True


def distill(config: Path, log: TextIO, *overrides: str) -> int:
    """Run ``tropd distill`` on a config; its exit code.

    Command, rank and engine are forked from two servers that have imported, as the suite's are:
    imports would take a third of a run's processor time, and change none of its numbers.
    """
    sys.path[:0] = {str(REPOSITORY), str(REPOSITORY / "tests")} - set(sys.path)
    import warm_commands
    import warm_engines

    environment = warm_engines.environment_of_commands(config.parent / "site", REPOSITORY)
    environment["OMP_NUM_THREADS"] = "1"
    command = warm_commands.Command(
        ["distill", config, *overrides], environment=environment, log=log
    )
    try:
        return command.wait()
    finally:
        command.terminate()


def work(results: Results, runs: Path, tasks: list[str]) -> None:
    """Make runs until none is left that nobody else makes."""
    tried: set[Run] = set()
    while True:
        lines = results.read()
        wanted = next_runs(last_values(lines))
        left = [run for run in wanted if run not in tried and run.task in tasks]
        if not left:
            return
        tried.add(left[0])
        make(left[0], runs / left[0].key, results)


def with_tables(page: str, lines: dict[Run, dict[str, Any]]) -> str:
    """The page with these lines' tables between its two marks."""
    before, _, rest = page.partition(f"{MARKS[0]}\n")
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{tables(lines)}\n\n{MARKS[1]}{after}"


def main() -> None:
    """Parse, then run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="scratch")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    parser.add_argument("--page", type=Path, help="write tables and plots into it, run nothing")
    args = parser.parse_args()
    results = Results(args.out)
    if args.table:
        print(tables(results.read()))
        return
    if args.page:
        args.page.write_text(with_tables(args.page.read_text(), results.read()))
        for name, text in drawings(results.read()).items():
            (args.page.parent / name).write_text(text)
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
