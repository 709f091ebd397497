"""Write the prompts of the second task: the quickstart's problems that never multiply.

python examples/two_tasks/make_sums.py
"""

import sys
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "arithmetic"))

from problems import Problem, problems  # noqa: E402

SIZES = {"train": 512, "heldout": 100}
"""Split -> problems: the same splits as the quickstart's, so no held-out prompt is trained on."""
WORDS = 10
"""Of a prompt with four operations, the fewest that there are."""


def is_short_sum(problem: Problem) -> bool:
    """Whether a problem is of the second task."""
    return "times" not in problem.prompt and len(problem.prompt.split()) == WORDS


def main() -> None:
    """Write a file for each split."""
    for split, count in SIZES.items():
        lines = [
            found.as_line() + "\n"
            for found in islice(filter(is_short_sum, problems(split, 77)), count)
        ]
        (HERE / f"sums_{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
