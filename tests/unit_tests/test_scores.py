"""avg@k, pass@k, majority and intervals against values computed by hand or in another way."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_tropd.base.errors import InputError
from megatron_tropd.tasks.exact_match import GradedResponse, result_of
from megatron_tropd.tasks.scores import at_most, interval, majority, measures, pass_at


@dataclass(frozen=True)
class Said:
    """An answer as far as scores read it."""

    prompt_index: int
    correct: bool | None
    given: str | None = None
    error: str = ""


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (1, 5), (3, 7), (7, 7), (2, 9)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(
    correct: int, total: int
) -> None:
    verdicts = [True] * correct + [False] * (total - correct)
    for k in range(1, total + 1):
        chosen = list(combinations(verdicts, k))
        assert pass_at(k, correct, total) == pytest.approx(
            float(Fraction(sum(map(any, chosen)), len(chosen))), abs=1e-12
        )


def test_pass_is_told_for_powers_of_two_and_for_all() -> None:
    assert [at_most(k) for k in (1, 2, 8, 12)] == [[], [2], [2, 4, 8], [2, 4, 8, 12]]


@pytest.mark.parametrize(
    ("given", "vote"),
    [
        ([("4", True), ("5", False), ("4.0", True)], 1.0),
        ([("1/2", True), ("0.5", True), ("7", False), ("", False), ("", False), ("", False)], 1.0),
        ([("4", True), ("5", False)], 0.5),
        ([("4", True), ("5", False), ("6", False)], 1 / 3),
        ([("5", False), ("5", False), ("4", True)], 0.0),
        ([("", False), ("", None)], 0.0),
        ([(None, True), (None, False)], None),
    ],
)
def test_the_answer_given_most_often_is_the_majoritys(
    given: Sequence[tuple[str | None, bool | None]], vote: float | None
) -> None:
    found = majority([Said(0, correct, text) for text, correct in given])
    assert found == (None if vote is None else pytest.approx(vote))


def test_measures_are_means_over_problems_and_failed_gradings_do_not_count() -> None:
    verdicts = {0: [True, True, False, False], 1: [True, None, False, False], 2: [False] * 4}
    answers = [Said(i, verdict) for i, mine in verdicts.items() for verdict in mine]
    answers += [Said(1, None, error="it hung")] * 2 + [Said(3, None, error="it hung")]
    found = measures(answers, 4)
    assert found["accuracy"] == [0.5, 0.25, 0.0]
    assert found["pass@2"] == pytest.approx([1 - 1 / 6, 1 - 3 / 6, 0.0])
    assert found["pass@4"] == [1.0, 1.0, 0.0]
    assert "majority@4" not in found, "these answers say nothing that could be counted"


def test_the_interval_is_that_of_another_bootstrap() -> None:
    values = np.random.default_rng(0).random(40)
    low, high = interval(values)
    rows = np.random.default_rng(9).integers(40, size=(20_000, 40))
    other = np.quantile(values[rows].mean(1), [0.025, 0.975])
    assert (low, high) == pytest.approx(other, abs=0.005)
    assert interval(values) == (low, high), "the same numbers have the same interval"
    assert interval([1.0] * 9) == (1.0, 1.0)
    assert interval([0.1, 0.2, 0.3], resamples=1)[0] <= 0.2


def response(problem: int, sample: int, correct: bool | None, **said: object) -> GradedResponse:
    settings = {"tokens": 10 + sample, "finish_reason": "stop", "given": "4", "error": ""} | said
    return GradedResponse(
        prompt_index=problem,
        prompt="2+2=",
        response="answer 4",
        answer="4",
        correct=correct,
        sample=sample,
        item=str(problem),
        **settings,  # type: ignore[arg-type]
    )


def test_thirty_two_samples_against_a_hand_computation() -> None:
    """Three problems: 32, 8 and 0 of 32 right; 24 of the second say 5, its last are cut off."""
    second = [
        response(1, i, i < 8, **({} if i < 8 else {"given": "5", "finish_reason": "length"}))
        for i in range(32)
    ]
    answers = [
        *(response(0, i, True) for i in range(32)),
        *second,
        *(response(2, i, False, given="") for i in range(32)),
    ]
    record = result_of(answers, 32).record()
    assert record["accuracy"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert record["pass@2"] == pytest.approx((1 + 1 - (24 * 23) / (32 * 31)) / 3)
    assert record["pass@32"] == pytest.approx(2 / 3)
    assert record["majority@32"] == pytest.approx(1 / 3)
    assert (record["correct"], record["total"]) == (40, 96)
    assert record["truncated_share"] == 24 / 96
    assert record["response_length"] == pytest.approx(10 + 31 / 2)
    assert (record["ci_low"], record["ci_high"]) == interval([1, 0.25, 0])
    assert record["intervals"]["pass@32"] == interval([1, 1, 0])


def test_one_answer_to_each_problem_has_wilsons_interval_and_nothing_further() -> None:
    result = result_of([response(i, 0, i < 7) for i in range(10)], 1)
    assert (result.accuracy, result.further, result.intervals) == (0.7, {}, {})
    assert 0.39 < result.ci_low < 0.4 < 0.89 < result.ci_high < 0.9
    with pytest.raises(InputError, match="gave no verdict on 2 of 2"):
        result_of([response(i, 0, None, error="it died") for i in range(2)], 1)
