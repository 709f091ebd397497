"""Make what two teachers of two tasks need: a second task, its teacher, and a student of both.

The plain task and its teacher are those of ``examples/arithmetic``. In the mirrored one a prompt
begins with "answer" in place of "start", and "add" means to take away and "take" to add. The second
teacher is the first one trained on mirrored problems alone; the student is that example's, trained
on both for a short time.

    python examples/two_teachers/make_models.py --out runs/two_teachers
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

ARITHMETIC = Path(__file__).resolve().parents[1] / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))

import make_pair  # noqa: E402
from problems import Problem, problems  # noqa: E402

PLAIN, MIRRORED = "plain", "mirrored"
NUM_PROMPTS, NUM_HELD_OUT = 4000, 300
"""Of both tasks together."""
RECIPES = {
    MIRRORED: replace(make_pair.RECIPES["teacher"], steps=100, lr=1e-3, warmup_steps=20, seed=1),
    "student": replace(
        make_pair.RECIPES["student"], steps=300, lr=1e-3, warmup_steps=20, stop_loss=0.11, seed=2
    ),
}
"""What goes on from the arithmetic example's models."""
SHARES = {MIRRORED: 1.0, "student": 0.5}
"""Of mirrored problems among those that a model learns from."""
_SWAPPED = {"start": "answer", "add": "take", "take": "add"}
_working_of = make_pair.working_of


def mirrored(problem: Problem) -> Problem:
    """The problem in the words of the mirrored task, with the same working."""
    words = [_SWAPPED.get(word, word) for word in problem.prompt.split(" ")]
    return replace(problem, prompt=" ".join(words))


def train(rank: int, share: float, *how: Any) -> None:
    """One rank of the training, as ``make_pair`` does it, on problems of both tasks."""

    def working_of(problem: Problem, recipe: Any, rng: random.Random) -> Any:
        chosen = mirrored(problem) if rng.random() < share else problem
        return _working_of(chosen, recipe, rng)

    make_pair.working_of = working_of
    make_pair.train_rank(rank, *how)


def line(problem: Problem, task: str) -> str:
    """A line of prompts or problems, which says of which task it is."""
    chosen = mirrored(problem) if task == MIRRORED else problem
    return json.dumps(json.loads(chosen.as_line()) | {"source": task}) + "\n"


def write_files(out: Path) -> None:
    """Write prompts to distil on and problems to be graded on, the two tasks in turn."""
    for split, count, name in (
        ("train", NUM_PROMPTS, "prompts.jsonl"),
        ("heldout", NUM_HELD_OUT, "heldout.jsonl"),
    ):
        drawn = islice(problems(split, seed=0), count)
        lines = [line(problem, (PLAIN, MIRRORED)[n % 2]) for n, problem in enumerate(drawn)]
        (out / name).write_text("".join(lines))


def make(name: str, out: Path) -> dict[str, Any]:
    """Train one model; what it took."""
    recipe = RECIPES[name]
    first = ARITHMETIC / ("student" if name == "student" else "teacher")
    with tempfile.TemporaryDirectory() as folder:
        scratch, began = Path(folder), time.perf_counter()
        mp.spawn(
            train, (SHARES[name], first, out / name, recipe, 1, scratch / "log.jsonl"), nprocs=1
        )
        seconds = round(time.perf_counter() - began)
        log = [json.loads(line) for line in (scratch / "log.jsonl").read_text().splitlines()]
    return {"recipe": asdict(recipe), "seconds": seconds, "log": log}


def main() -> None:
    """Make everything that is missing, and record it in models.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_files(out)
    record = out / "models.json"
    made = json.loads(record.read_text()) if record.exists() else {}
    for name in RECIPES:
        if name not in made:
            made[name] = make(name, out)
            record.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
