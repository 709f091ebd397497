"""Chained arithmetic with written-out working: the task of the quickstart.

A prompt such as ``start 47 add 38 take 19 times 3:`` is answered by one line for every operation
and a last line with the result::

    47+38=85
    85-19=66
    66*3=198
    answer 198

Every line continues from the number before it, so one wrong line spoils all that follow. All
intermediate results lie between ``SMALLEST`` and ``LARGEST``. Training and held-out problems are
kept apart by a hash of the prompt, whatever the seed.

    python problems.py --split train --count 4000 --out prompts.jsonl
"""

import argparse
import hashlib
import json
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

SMALLEST, LARGEST = 10, 99
MIN_OPERATIONS, MAX_OPERATIONS = 4, 6
TIMES_SHARE = 0.4
"""How often a number is multiplied where a product fits (the other steps add or take away)."""
HELD_OUT_SHARE = 16
"""One prompt in so many belongs to the held-out split."""


@dataclass(frozen=True)
class Problem:
    """One problem with its solution."""

    prompt: str
    """What the model is asked, such as ``start 47 add 38:``."""
    working: str
    """What it should write, the line with the answer included."""
    answer: int
    """The number in the last line."""

    def as_line(self) -> str:
        """One JSON line: the prompt, what the grader needs, and a golden answer."""
        line = {"prompt": self.prompt, "answer": str(self.answer), "solution": self.working}
        return json.dumps(line)


def _operation(value: int, rng: random.Random) -> tuple[str, str, int]:
    """A word for the prompt, a line of working and the result, for one step from ``value``."""
    if 2 * value <= LARGEST and rng.random() < TIMES_SHARE:
        word, sign, operand = "times", "*", rng.randint(2, LARGEST // value)
        result = value * operand
    else:
        # A uniform result keeps the numbers from drifting to the ends of the range.
        result = rng.choice([n for n in range(SMALLEST, LARGEST + 1) if n != value])
        word, sign = ("add", "+") if result > value else ("take", "-")
        operand = abs(result - value)
    return f"{word} {operand}", f"{value}{sign}{operand}={result}\n", result


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem of ``MIN_OPERATIONS`` to ``MAX_OPERATIONS`` chained operations."""
    value = rng.randint(SMALLEST, LARGEST)
    prompt, working = [f"start {value}"], ""
    for _ in range(rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)):
        words, line, value = _operation(value, rng)
        prompt.append(words)
        working += line
    return Problem(" ".join(prompt) + ":", f"{working}answer {value}", value)


_LINE = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def with_slips(problem: Problem, rng: random.Random, share: float) -> list[tuple[str, bool]]:
    """The working of somebody careless, who goes on from every slip as if it were right.

    A slip replaces the first number, the sign, the second number or the result of a line; all that
    follows is computed from what stands there. A teacher trained on everything but the slips
    knows how to go on from a student's mistakes, which is where an on-policy teacher works.

    Args:
        problem: whose working is rewritten.
        rng: draws the slips.
        share: probability that a line has one.

    Returns:
        (text, False where it is a slip) in order; joined they are a working.
    """
    pieces: list[tuple[str, bool]] = []
    value = int(_LINE.findall(problem.working)[0][0])
    for _, sign, operand, _ in _LINE.findall(problem.working):
        slips = {rng.randrange(4)} if rng.random() < share else set()
        if 0 in slips:
            value = _nearby(value, rng)
        if 1 in slips:
            sign = rng.choice("+-")
        if 2 in slips:
            operand = str(_nearby(int(operand), rng))
        result = _APPLY[sign](value, int(operand))
        if 3 in slips or not 0 <= result <= 2 * LARGEST:
            # A number out of range is nothing a teacher should learn to write.
            slips.add(3)
            result = _nearby(min(max(result, SMALLEST), LARGEST), rng)
        fields = (str(value), sign, f"{operand}=", f"{result}\n")
        pieces += [(text, index not in slips) for index, text in enumerate(fields)]
        value = result
    return [*pieces, (f"answer {value}", True)]


def _nearby(value: int, rng: random.Random) -> int:
    """Another number of up to two digits, most often off in one digit."""
    if rng.random() < 0.7:
        other = value + rng.choice((-10, 10, -1, 1, -20, 20, -2, 2))
    else:
        other = rng.randint(SMALLEST, LARGEST)
    return other if 1 <= other <= LARGEST and other != value else rng.randint(SMALLEST, LARGEST)


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to: a property of its text alone."""
    first_byte = hashlib.sha256(prompt.encode()).digest()[0]
    return "heldout" if first_byte % HELD_OUT_SHARE == 0 else "train"


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """Endless stream of different problems of one split, the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    seen = set()
    while True:
        problem = make_problem(rng)
        if split_of(problem.prompt) == split and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def main() -> None:
    """Write problems as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "heldout"), required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stream = problems(args.split, args.seed)
    with open(args.out, "w", encoding="utf-8") as file:
        file.writelines(next(stream).as_line() + "\n" for _ in range(args.count))


if __name__ == "__main__":
    main()
