"""What several answers to each problem say of a model: mean accuracy, pass@k, majority, intervals.

Problems are the units: answers to one problem are not independent of each other. Numbers of a set
are means over its problems, and intervals come from drawing problems anew.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from math import comb
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.tasks.answers import compare, read_answer, same_text

_RESAMPLES = 10_000
_AT_ONCE = 2**22
"""Numbers drawn at once: 32 MiB."""
_SEED = 20_240_601
_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Answer(Protocol):
    """What is read of a graded answer."""

    @property
    def prompt_index(self) -> int:
        """Of its problem."""

    @property
    def correct(self) -> bool | None:
        """The verdict; None: there is none, or it cannot be judged."""

    @property
    def error(self) -> str:
        """Why the grader gave no verdict; then it does not count."""

    @property
    def given(self) -> str | None:
        """What it gives as the answer, for the vote."""


def by_problem[A: Answer](answers: Sequence[A]) -> list[list[A]]:
    """Group answers by problem, in order; those at which the grader failed are left out."""
    counted = sorted((a for a in answers if not a.error), key=lambda answer: answer.prompt_index)
    return [list(group) for _, group in groupby(counted, lambda answer: answer.prompt_index)]


def pass_at(k: int, correct: int, total: int) -> float:
    r"""Estimate without bias how likely one of ``k`` answers to a problem is right.

    .. math:: 1 - \binom{n - c}{k} / \binom{n}{k}

    Args:
        correct: c of the n answers.
        total: n, at least k.

    Source: Chen et al., "Evaluating large language models trained on code", arXiv 2107.03374.
    """
    return 1.0 - comb(total - correct, k) / comb(total, k)


def majority(answers: Sequence[Answer]) -> float | None:
    """Tell whether the answer given most often is right; of several, the share that is.

    Answers are one if a grader of texts would say so (``1/2`` and ``0.5``). Those that give none do
    not vote.

    Returns:
        0 to 1; 0 if no answer gives any. None: this grader does not say what answers give.
    """
    if all(answer.given is None for answer in answers):
        return None
    ballots: list[list[Answer]] = []
    for answer in answers:
        if answer.given:
            alike = (b for b in ballots if b[0].given and is_same(b[0].given, answer.given))
            ballot = next(alike, None)
            if ballot is None:
                ballots.append(ballot := [])
            ballot.append(answer)
    most = max(map(len, ballots), default=0)
    winners = [ballot for ballot in ballots if len(ballot) == most]
    return sum(b[0].correct is True for b in winners) / len(winners) if winners else 0.0


def is_same(one: str, other: str) -> bool:
    """Whether two given answers are surely the same."""
    return same_text(one, other) or compare(read_answer(one), read_answer(other)) is True


def interval(
    values_N: Sequence[float] | NDArray[np.float64], resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Draw the units anew again and again: 95 % percentile interval of their mean.

    Args:
        values_N: of each unit, at least one.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    values, draws = np.asarray(values_N, np.float64), np.random.default_rng(_SEED)
    rows = max(1, _AT_ONCE // len(values))
    means = np.concatenate(
        [
            values[draws.integers(len(values), size=(min(rows, resamples - i), len(values)))].mean(
                1
            )
            for i in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    # Rounding must not leave the mean itself outside.
    mean = float(values.mean())
    return min(float(low), mean), max(float(high), mean)


def at_most(k: int) -> list[int]:
    """Powers of 2 above 1 and below ``k``, and ``k``: the ones that pass@k is told for."""
    powers = [2**i for i in range(1, k.bit_length()) if 2**i < k]
    return [*powers, k] if k > 1 else []


def measures_of(group: Sequence[Answer], samples: int) -> dict[str, float]:
    """Compute the measures of one problem.

    Args:
        group: its answers with a verdict, at least one.
        samples: k, asked of each problem.

    Returns:
        ``accuracy``; ``pass@j`` if there are as many answers; ``majority@k`` if answers can vote.
    """
    right, total = sum(answer.correct is True for answer in group), len(group)
    found = {"accuracy": right / total}
    found |= {f"pass@{j}": pass_at(j, right, total) for j in at_most(samples) if j <= total}
    vote = majority(group) if samples > 1 else None
    return found | ({} if vote is None else {f"majority@{samples}": vote})


def measures(answers: Sequence[Answer], samples: int) -> dict[str, list[float]]:
    """Collect each measure of each problem that has it."""
    found: dict[str, list[float]] = {}
    for group in by_problem(answers):
        for name, value in measures_of(group, samples).items():
            found.setdefault(name, []).append(value)
    return found


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    r"""95 % confidence interval of a share.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        total: trials, at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, z2 = correct / total, _Z_95**2
    centre = share + z2 / (2 * total)
    spread = _Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not leave the share itself outside.
    return max(0.0, min(share, low)), min(1.0, max(share, high))
