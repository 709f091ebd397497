"""Make a student that writes another dialect than the teacher of ``examples/arithmetic``.

The same problems, but half of its workings put the second number of a line first (``27+50=77`` for
"start 50 add 27"), and some are left out. Trained as that example's student is.

    python examples/dialect/make_student.py --out examples/dialect
"""

import argparse
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

ARITHMETIC = Path(__file__).resolve().parents[1] / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))

import make_pair  # noqa: E402
from problems import Problem  # noqa: E402

SHARES = {"turned round": 0.5, "answer only": 0.1, "as the teacher": 0.4}
"""How many of the student's training problems are written how."""
RECIPE = replace(make_pair.RECIPES["student"], stop_loss=0.12)


def rewritten(problem: Problem, rng: random.Random) -> Problem:
    """The problem with a working in a dialect drawn by ``SHARES``."""
    (dialect,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
    working = problem.working
    if dialect == "turned round":
        working = re.sub(r"(\d+)([-+*])(\d+)=", r"\3\2\1=", working)
    elif dialect == "answer only":
        working = working.splitlines()[-1]
    return replace(problem, working=working)


def in_dialects(
    problem: Problem, recipe: make_pair.Recipe, rng: random.Random
) -> tuple[Problem, list[tuple[str, bool]]]:
    """What ``make_pair`` trains on: the problem and its working in pieces."""
    other = rewritten(problem, rng)
    return other, [(other.working, True)]


def main() -> None:
    """Train the student and record it in student.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out
    made = make_pair.make("student", RECIPE, out, 1, heldout=ARITHMETIC / "heldout.jsonl")
    (out / "student.json").write_text(json.dumps(made | {"dialects": SHARES}, indent=2) + "\n")


make_pair.working_of = in_dialects  # also in the ranks that are spawned
if __name__ == "__main__":
    main()
