"""``tropd compare``: two models' answers to the same problems, paired by problem."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import InputError
from megatron_tropd.config.run_folder import RunFolder

if TYPE_CHECKING:
    from megatron_tropd.tasks.comparison import Comparison, Difference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd compare``."""
    what = "folder of `tropd evaluate --out`, one of its files, or run folder (its last student)"
    parser.add_argument("a", type=Path, help=what)
    parser.add_argument("b", type=Path, help="the same of another model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print."""
    from megatron_tropd.tasks.comparison import compare_files

    a, b = answers_in(arguments.a), answers_in(arguments.b)
    found = compare_files(a, b)
    if arguments.json:
        record = {"a": str(a), "b": str(b), "sets": {c.name: c.record() for c in found}}
        print(json.dumps(record))
    else:
        print(f"A: {a}\nB: {b}")
        print("\n".join(line for comparison in found for line in lines_of(comparison)))
    return 0


def answers_in(path: Path) -> Path:
    """Find the answers that a path stands for: those of a run are its last student's.

    Raises:
        InputError: there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path} is not there: give a folder or file of answers, or a run folder.")
    steps = sorted(RunFolder(path).answers.glob("student_step_*"))
    return steps[-1] if steps else path


def lines_of(comparison: "Comparison") -> list[str]:
    """A comparison for the terminal."""
    alone = [
        f"{count} only in {who}"
        for who, count in (("A", comparison.only_a), ("B", comparison.only_b))
        if count
    ]
    problems = ", ".join([f"{comparison.common} problems in both", *alone])
    differing = [
        f"  differs: {name}: {a!r:.60} in A, {b!r:.60} in B"
        for name, (a, b) in comparison.settings.items()
    ]
    measured = [_line(name, found) for name, found in comparison.measures.items()]
    return [f"{comparison.name}: {problems}", *measured, *differing]


def _line(name: str, found: "Difference") -> str:
    unit, places = (1, 1) if name == "response_length" else (100, 1)
    sign = "" if unit == 1 else " %"
    a, b, gap, low, high = (
        unit * value for value in (found.a, found.b, found.difference, found.ci_low, found.ci_high)
    )
    verdict = "" if found.is_told_apart else "; not told apart"
    return (
        f"  {name:<16} A {a:.{places}f}{sign}, B {b:.{places}f}{sign}, B - A {gap:+.{places}f} "
        f"(95 % interval {low:+.{places}f} .. {high:+.{places}f}); more in B on {found.b_better}, "
        f"in A on {found.a_better} of {found.problems}{verdict}"
    )
