"""Graders and the confidence interval."""

import math

import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.tasks.exact_match import wilson_interval
from megatron_tropd.tasks.graders import grade, last_number, marked_answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("47+38=85, 85-19=66. answer 66", "66"),
        ("95 take 57 38\nanswer -61\n", "-61"),
        ("so 3 apples.\n#### 1,234", "1,234"),
        ("The answer is: $18. Then 5 more lines\n7", "5"),
        ("The Answer is 42\nstart 7 add 8:", "42"),
        (r"thus \boxed{\frac{1}{2} + 40 = 41} and 7", "41"),
        (r"\boxed{x + y}", "x + y"),
        ("answer 5, no: answer 6", "6"),
        ("answer: .5", ".5"),
        ("answer", None),
        ("47+38=85", None),
        ("an answerless 5", None),
        ("", None),
    ],
)
def test_marked_answer(text: str, found: str | None) -> None:
    assert marked_answer(text) == found


def test_last_number() -> None:
    assert last_number("1 then -2.5 then x") == "-2.5"
    assert last_number("none") is None


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("answer 66", "66", True),
        ("answer 066.0", "66", True),
        ("answer 66", "-66", False),
        ("answer 6", "66", False),
        ("66", "66", False),
        ("#### 1,000", "1000", True),
        ("The answer is 18", "She makes 9 * 2 = $18 a day.\n#### 18", True),
        ("The answer is 2", "She makes 9 * 2 = $18 a day.\n#### 18", False),
        (r"\boxed{ Blue }", "blue", True),
        ("answer 50%", "50", True),
        ("answer ten", "10", False),
    ],
)
def test_grade(response: str, answer: str, correct: bool) -> None:
    assert grade(response, answer) is correct


def test_graders_are_chosen_by_name() -> None:
    assert grade("it makes 66", "66", grader="last_number")
    with pytest.raises(ConfigError, match="Known: marked, last_number"):
        grade("66", "66", grader="none")


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (350, 500), (10, 10), (1, 1)])
def test_wilson_interval_ends_where_the_score_test_does(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            z = (correct / total - end) / math.sqrt(end * (1 - end) / total)
            assert math.isclose(abs(z), 1.959964, rel_tol=1e-5)
