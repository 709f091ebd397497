# ruff: noqa: RUF001
"""Graders and the confidence interval."""

import json
import math
import random
import time
from pathlib import Path

import pytest

from megatron_tropd.tasks.exact_match import wilson_interval
from megatron_tropd.tasks.graders import grade, marked_answer

SAME = r"""
answer: 3 millions ~ 3000000
answer: 2 lakh ~ 200000
answer: `5` ~ 5
answer: 'Paris' ~ Paris
answer: 5 a day ~ 5
answer: 25 square meters ~ 25
answer: increased by a factor of 5 ~ 5
The greatest common factor is 5, so the answer is the greatest common factor 5 ~ 5
Answer: C. not enough information ~ C
answer: yes, no remainder is left ~ yes
answer: 36 / 2 = 18 eggs ~ 18
\boxed{x^{12}} ~ x^12
\boxed{10^{-2}} ~ 0.01
\boxed{\frac{3}{2}} ~ 1.5
\boxed{\frac32} ~ 3/2
\boxed{\dfrac{3}{2}} ~ \tfrac{3}{2}
\boxed{-\frac{1}{2}} ~ -0.5
\boxed{\frac{-1}{2}} ~ -0.5
\boxed{1\frac{1}{2}} ~ 1.5
answer: 1 1/2 ~ 1.5
answer: 2½ ~ 2.5
answer: ½ ~ 0.5
\boxed{\frac{10}{4}} ~ 2.5
\boxed{\frac1{72}} ~ 1/72
\boxed{\frac{\sqrt{2}}{2}} ~ \frac{\sqrt2}{2}
\boxed{\frac{1}{\sqrt{2}}} ~ \frac{\sqrt{2}}{2}
\boxed{3/4} ~ 0.75
\boxed{1/3} ~ 0.333333
\boxed{0.6667} ~ 2/3
\boxed{0.125} ~ 1/8
answer: 0.50 ~ .5
answer: 5. ~ 5
answer: 5.0. ~ 5
answer: -.5 ~ -1/2
answer: +5 ~ 5
answer: - 5 ~ -5
answer: −1/2 ~ -0.5
answer: –3 ~ -3
answer: 1,234,567 ~ 1234567
answer: 1,234,567.89 ~ 1234567.89
\boxed{10{,}000} ~ 10,000
\boxed{10\,000} ~ 10000
answer: 10 000 ~ 10000
answer: 1e3 ~ 1000
answer: 1E3 ~ 1000
\boxed{1.5\times10^{3}} ~ 1500
\boxed{1.5 \cdot 10^3} ~ 1500
\boxed{3\times 10^{-2}} ~ 0.03
\boxed{10^{3}} ~ 1000
\boxed{2^{10}} ~ 1024
\boxed{2^{-1}} ~ 0.5
\boxed{2³} ~ 8
answer: 007 ~ 7
answer: 0 ~ -0
answer: 0.0 ~ 0
answer: 00 ~ 0
answer: 50% ~ 50
answer: 50% ~ 0.5
answer: 0.5 ~ 50%
answer: 50 percent ~ 50%
answer: 0.5% ~ 0.5
\boxed{50\%} ~ 50
answer: $18 ~ 18
answer: $18.00 ~ 18
\boxed{\$18} ~ 18
answer: $1,234.50 ~ 1234.5
answer: 18 dollars ~ $18
answer: €18 ~ 18
answer: 18 USD ~ $18
answer: -$5 ~ -5
answer: $-5 ~ -5
The answer is $18$. ~ 18
answer: $18$ dollars ~ 18
answer: 18 cents ~ 18
answer: 5 million ~ 5000000
answer: 1.5 million dollars ~ $1,500,000
answer: 5 thousand ~ 5,000
answer: 2 dozen ~ 24
answer: 10 m ~ 10
answer: 10 m ~ 10 meters
answer: 10cm ~ 10
answer: 10 m^2 ~ 10
\boxed{10\text{ cm}^2} ~ 10
\boxed{10\,\mathrm{cm}^{2}} ~ 10
\boxed{45^\circ} ~ 45
\boxed{45^{\circ}} ~ 45 degrees
answer: 45° ~ 45
answer: 5 apples ~ 5
answer: 5 apples ~ 5 apple
answer: 60 km/h ~ 60
answer: 60 miles per hour ~ 60
answer: 10 square meters ~ 10
answer: 5 hours ~ 5 h
\boxed{2\pi} ~ 2 \pi
\boxed{4\sqrt{2}} ~ \sqrt{32}
\boxed{\sqrt{16}} ~ 4
\boxed{x^2+1} ~ x^2 + 1
\boxed{x^{2}+1} ~ x^2+1
\boxed{x²} ~ x^2
\boxed{x \leq 5} ~ x \le 5
\boxed{3+4} ~ 7
\boxed{2(3)} ~ 6
\boxed{2+2=4} ~ 4
answer: 9*2=18 ~ 18
\boxed{x = 5} ~ 5
answer: x = 5 ~ x=5
\boxed{x = 5, y = 7} ~ x=5,y=7
\boxed{x = 5, y = 7} ~ 5, 7
answer: n is 5 ~ 5
\boxed{\frac{x}{2}} ~ x/2
\boxed{\frac{x+1}{2}} ~ \dfrac{x + 1}{2}
\boxed{f(x)=2x} ~ f(x) = 2x
\boxed{(1,2)} ~ (1, 2)
\boxed{\left(1, 2\right)} ~ (1,2)
\boxed{1,2} ~ 1, 2
\boxed{1 and 2} ~ 1, 2
\boxed{1 or 2} ~ 1,2
\boxed{1 \text{ and } 2} ~ 1,2
\boxed{\{1,2\}} ~ \{2,1\}
\boxed{\{1,2\}} ~ {2, 1}
\boxed{\{1,2\}} ~ 1,2
\boxed{[0,5)} ~ [0, 5)
\boxed{(-\infty, 3]} ~ (-\infty,3]
\boxed{[0.5, 1]} ~ [\frac12, 1]
\boxed{(1,2)\cup(3,4)} ~ (1,2) \cup (3,4)
\boxed{(5)} ~ 5
\boxed{(1,2),(3,4)} ~ (1,2), (3,4)
\boxed{(\frac{1}{2}, 3)} ~ (0.5, 3)
\boxed{B} ~ B
\boxed{b} ~ B
Answer: (B) ~ B
Answer: B) 12 ~ B
Answer: B. Paris ~ B
The answer is (C) because A is wrong ~ C
The answer is option D ~ D
answer: **C** ~ C
\boxed{\textbf{(A)}} ~ A
\boxed{\mathrm{(E)}} ~ E
Answer: A and C ~ A, C
answer: yes ~ Yes
answer: Yes, because it is ~ yes
answer: No. ~ no
answer: True ~ true
answer: Paris ~ paris
answer: no solution ~ No solution.
answer: H2O ~ h2o
\boxed{\text{no answer}} ~ no answer
\boxed{\text{The answer is 5}} ~ The answer is 5
The answer is that she has 18 eggs left. ~ 18
So the answer is 5 + 13 = 18. ~ 18
The answer is 18, so he has 3 left. ~ 18
The answer is 18. I had 5 before. ~ 18
The answer is about $18 ~ 18
The answer to question 3 is 18 ~ 18
The answer for part (b) is 18 ~ 18
Final Answer: The final answer is $5$. I hope it is correct. ~ 5
**Answer:** 5 ~ 5
**Answer**: 5 ~ 5
<answer>42</answer> ~ 42
<answer> 42 </answer> done ~ 42
Answer - 5 ~ 5
answer -5 ~ -5
\boxed{5}. I hope my answer helps! ~ 5
#### 18 is the answer. ~ 18
\boxed{5 ~ 5
\boxed{\boxed{5}} ~ 5
\boxed 5 ~ 5
\boxed{5} and \boxed{7} ~ 5,7
\boxed{5}. No wait, \boxed{7} ~ 7
\boxed{5} answer: 6 ~ 6
"""
"""Response ~ reference: right."""

DIFFERENT = r"""
\boxed{\frac{1}{2}} ~ 2
\boxed{\frac{1}{2}} ~ 12
\boxed{\frac{1}{2}} ~ 1
\boxed{1\frac{1}{2}} ~ 11/2
answer: 1 1/2 ~ 5.5
answer: 21/2 ~ 2 1/2
\boxed{\frac{\sqrt{2}}{2}} ~ 2
\boxed{3/4} ~ 3
\boxed{3/4} ~ 4
\boxed{0.34} ~ 1/3
\boxed{0.13} ~ 1/8
.5 ~ 5
answer .5 ~ 5
answer: 3 ~ -3
answer: 12,34 ~ 1234
answer: 1,23 ~ 123
answer: 3,5 ~ 35
\boxed{10^{3}} ~ 10
\boxed{2^10} ~ 210
\boxed{2³} ~ 23
answer: 50% ~ 5
answer: 0.5% ~ 50
answer: 5% ~ 50%
answer: $18 and $20 ~ 18
answer: $5 million ~ 5
answer: 5 million ~ 5
answer: 2 dozen ~ 2
answer: 5 apples ~ 6
answer: 10 m3 ~ 103
answer: 10 m2 ~ 102
\boxed{2pi} ~ 2
\boxed{\pi} ~ 3.2
\boxed{4\sqrt{2}} ~ \sqrt{33}
\boxed{3+4} ~ 8
answer: x = 5 ~ 6
\boxed{x = 5, y = 7} ~ 5
\boxed{x=5, y=7} ~ 12
\boxed{x=5, y=7} ~ 57
\boxed{(1,2)} ~ 12
\boxed{(1,2)} ~ (2,1)
\boxed{(1,2)} ~ 1,3
\boxed{1,2} ~ 1,2,3
\boxed{1,2} ~ 2
\boxed{\{1,2\}} ~ \{1,3\}
\boxed{[0,1]} ~ (0,1)
\boxed{[0,5)} ~ [0,6)
\boxed{(-\infty, 3]} ~ (-\infty,4]
\boxed{(1,2),(3,4)} ~ (1,2),(3,5)
Answer: B. Paris ~ C
Answer: A ~ B
answer: yes ~ no
answer: false ~ true
answer: true, false, true ~ true, true, true
answer: 5 millions ~ 5
answer: Paris ~ Rome
answer: New York ~ Newyork
answer: unknown ~ 10
The answer is 5 and 3 ~ 5
answer: 18 or 20 ~ 18
answer: 0.1+0.2 ~ 0.4
answer: 18.0000001 ~ 18
answer: x5 ~ 5
answer -5 ~ 5
42 ~ 42
no mark 42 ~ 42
answer: ~ 5
\boxed{} ~ 5
\boxed{5} and \boxed{7} ~ 7
"""
"""Wrong, whoever looks at it."""

CANNOT_JUDGE = r"""
answer: the square of 5 ~ 5
answer: the reciprocal of 5 ~ 5
answer: double 5 ~ 5
answer: 5 doubled ~ 5
answer: 5 tens ~ 5
answer: 5 mil ~ 5
answer: multiples of 5 ~ 5
answer: divisible by 5 ~ 5
answer: exceeds 5 ~ 5
answer: it cannot be 5 ~ 5
answer: 5 is wrong ~ 5
answer: 5 upwards ~ 5
answer: 5 i ~ 5
answer: 6=5 ~ 5
answer: 9*2=19 ~ 19
\boxed{x'} ~ x
\boxed{5'} ~ 5
Answer: A' ~ A
Answer: (A) or (B) ~ A
\boxed{A. B} ~ A
Answer: A is wrong ~ A
answer: true, false ~ true
answer: true, false, true ~ true
answer: yes, but no ~ yes
\boxed{x^{2}y} ~ x^{2y}
\boxed{10^{2}5} ~ 10^{25}
\boxed{\frac{1}{2x}} ~ 1/2x
\boxed{0.33} ~ 1/3
\boxed{0.666} ~ 2/3
\boxed{0.6666} ~ 2/3
answer: 1 2 ~ 12
answer: 12 ~ 1 2
answer: 3,5 ~ 3.5
answer: 1.234,56 ~ 1234.56
answer: 1e999999999 ~ 1
\boxed{9^{9^{9^{9}}}} ~ 9
\boxed{1/0} ~ 0
answer: €18 ~ $18
answer: 5k ~ 5
answer: 10 cm ~ 10 m
answer: 10m ~ 10
answer: 5 apples ~ 5 pears
answer: 100 cm ~ 1 m
answer: 3 halves ~ 3
answer: 5 hundredths ~ 5
answer: 5 squared ~ 5
answer: 2 thirds ~ 2
answer: 5 ft 3 in ~ 5
\boxed{5x} ~ 5
\boxed{2n} ~ 2
answer: 5x ~ 5
\boxed{\pi} ~ 3.14159
\boxed{\sqrt{2}} ~ 1.4142
\boxed{\sqrt[3]{8}} ~ 3
\boxed{x^2+1} ~ x^2+2
\boxed{x^2} ~ x2
\boxed{x²} ~ x2
\boxed{x+1} ~ 1+x
\boxed{x > 5} ~ 5
\boxed{x < 5} ~ x > 5
\boxed{5!} ~ 5
\boxed{2x = 10} ~ 10
answer: x = 5 ~ y = 5
\boxed{101_2} ~ 101
\boxed{101_2} ~ 2
\boxed{2\frac{x}{3}} ~ 2
\boxed{1/2x} ~ 1/2
\boxed{\pm 5} ~ 5
\boxed{5 \pm 2} ~ 5
\boxed{(1,2)} ~ 1,2
\boxed{1,2} ~ 2,1
\boxed{\{5\}} ~ 5
\boxed{(1,200)} ~ 1200
\boxed{(1,200)} ~ (1, 200)
answer: 1,200 ~ 1, 200
\boxed{[5]} ~ 5
answer: 3:4 ~ 3/4
answer: 10:30 ~ 10
answer: 5-7 ~ 5
answer: 5-7 ~ -2
answer: 2024-01-05 ~ 2024
answer: B ~ 12
answer: Paris ~ B
answer: A cat ~ A
answer: AB ~ A
Answer: A, B ~ A
answer: not 18 ~ 18
answer: at least 18 ~ 18
answer: Paris, France ~ Paris
answer: not Paris ~ Paris
answer: ten ~ 10
answer: CO2 ~ CO_2
The answer is 5 apples and 3 pears ~ 5
answer: 2 hours and 30 minutes ~ 2.5
answer: 5 and a half ~ 5
answer: 5 and a half ~ 5.5
answer: 5 and 1/2 ~ 5.5
answer: twenty-five ~ 5
answer: 18 - 20 ~ 18
answer: 5 x 3 ~ 5
answer: 3.5.2 ~ 3.5
answer: 5th ~ 5
answer: 5e ~ 5
answer: log 5 ~ 5
answer: |5| ~ 5
answer: 5 choose 2 ~ 5
"""
"""Perhaps the same, perhaps not; above all not right."""

IDENTICAL = r"""
x^2+1 | \frac{a}{b} | (1,2) | [0,5) | \{1,2\} | {1,2} | yes | B | no solution | Paris, France | 5!
x = 5, y = 7 | \begin{pmatrix}1\\2\end{pmatrix} | 1:2 | 10:30 am | 2024-01-05 | CO2 | A.B. | i+j
1,2,3 | 5 apples, 3 pears | f(x)=x^2 | [1] | ∅ | \emptyset | 3 1/2 | x | the answer | answer
answer: x | What? Yes. No | a (b c) | 12 because 3 | \text{(A) and (B)} | 1.000,5 | ½ cup | $5 | 5$
**x** | "quoted" | \boxed{3} | #### | π/2 | ≥ 5 | e^{i\pi} | \sin x | 5 = 5 | true | 1/0 | 100% | %
€ | 1 000 | x_1 | \overline{AB} | ABC | 12:00 | 0x1F | 1010_2 | A | a | I | 不知道 | 四十二 | 42号
"""
"""Answers of every form: each equals itself, however it is announced."""
FORMS = (
    r"\boxed{%s}",
    "so The answer is %s",
    "answer: %s",
    "working\n#### %s",
    "Thus the answer is %s.",
    "<answer>%s</answer>",
)


def _pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(line.split(" ~ ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("response", "answer"), _pairs(SAME))
def test_the_same_answer_is_right(response: str, answer: str) -> None:
    assert grade(response, answer) is True


@pytest.mark.parametrize(("response", "answer"), _pairs(DIFFERENT))
def test_another_answer_is_wrong(response: str, answer: str) -> None:
    assert grade(response, answer) is False


@pytest.mark.parametrize(("response", "answer"), _pairs(CANNOT_JUDGE))
def test_what_cannot_be_judged_is_neither(response: str, answer: str) -> None:
    assert grade(response, answer) is None


@pytest.mark.parametrize("form", FORMS)
def test_identical_answers_are_equal(form: str) -> None:
    answers = [
        answer.strip() for line in IDENTICAL.strip().splitlines() for answer in line.split(" | ")
    ]
    wrong = [answer for answer in answers if grade(form % answer, answer) is not True]
    assert len(answers) > 60 and not wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("47+38=85, 85-19=66. answer 66", "66"),
        ("95 take 57 38\nanswer -61\n", "-61"),
        ("so 3 apples.\n#### 1,234", "1,234"),
        ("The answer is: $18. Then 5 more lines\n7", "$18"),
        ("The Answer is 42\nstart 7 add 8:", "42"),
        (r"thus \boxed{\frac{1}{2} + 40 = 41} and 7", r"\frac{1}{2} + 40 = 41"),
        (r"\boxed{x + y}", "x + y"),
        (r"\boxed{\text{no answer}}", r"\text{no answer}"),
        (r"\boxed{a\{b\}}", r"a\{b\}"),
        ("answer 5, no: answer 6", "6"),
        ("answer: .5", ".5"),
        ("#### 42\n\nQuestion: 1+1?\nAnswer: 2\n#### 2", "42"),
        ("Question: 1+1?\nAnswer: 2", "2"),
        ("The answer is 18.\n\nQ: 2+2?\nA: The answer is 4.", "18."),
        ("The answer is 18 (that is 9 x 2)", "18"),
        ("The answer is\n\\[\n42\n\\]", "42"),
        ("Answer\n5", "5"),
        ("<answer> 42 </answer> done", "42"),
        ("answer", None),
        ("answer:", None),
        (r"\boxed{}", None),
        ("47+38=85", None),
        ("an answerless 5", None),
        ("", None),
    ],
)
def test_marked_answer(text: str, found: str | None) -> None:
    mark = marked_answer(text)
    assert (mark and mark.text) == found


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
        ("answer ten", "10", None),
    ],
)
def test_grade(response: str, answer: str, correct: bool | None) -> None:
    assert grade(response, answer) is correct


def test_answers_of_users(shared_data: Path) -> None:
    lines = (shared_data / "user_files" / "answers.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) >= 33
    wrong = [c for c in cases if grade(c["response"], c["answer"]) is not c["equal"]]
    assert not wrong


def _solutions(file: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("name", "count"), [("test", 1319), ("train", 7473)])
def test_every_solution_of_gsm8k_is_right(shared_data: Path, name: str, count: int) -> None:
    solutions = _solutions(shared_data / "gsm8k" / f"{name}.jsonl")
    assert sum(grade(solution, solution) is True for solution in solutions) == count


def test_an_answer_of_gsm8k_is_right_for_its_problem_alone(shared_data: Path) -> None:
    solutions = _solutions(shared_data / "gsm8k" / "test.jsonl")
    answers = [solution.rpartition("#### ")[2] for solution in solutions]
    pairs = list(zip(solutions, answers, strict=True))
    assert all(grade(solution, answer) is True for solution, answer in pairs)
    # The next problem's answer is right only if it is the same number.
    others = zip(solutions, answers[1:] + answers[:1], answers, strict=True)
    values = [(grade(s, other), _number(other) == _number(own)) for s, other, own in others]
    assert all(verdict is same for verdict, same in values)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_no_number_is_taken_for_another() -> None:
    """Every way to write a number, against every way to write another one."""
    draw = random.Random(0)
    numbers = [*range(-2, 6), 12, 23, 100, 120, 200, 1000, 1200, 12345, 1234567]
    numbers += [draw.randint(-(10**6), 10**6) for _ in range(5)]
    ways = {n: _spellings(n) for n in dict.fromkeys(numbers)}
    for number, spellings in ways.items():
        for text in spellings:
            verdicts = {other: grade(rf"\boxed{{{text}}}", str(other)) for other in ways}
            assert [other for other, verdict in verdicts.items() if verdict] == [number], text


def _spellings(n: int) -> list[str]:
    """Integers as people and models write them."""
    sign, size = ("-" if n < 0 else ""), abs(n)
    return [
        *(str(n), f"{n}.0", f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n:,}".replace(",", r"\,")),
        *(f"{sign}\\${size:,}", f"{n} \\text{{ apples}}", f"x = {n}", f"({n})", rf"\text{{{n}}}"),
        *(
            rf"\frac{{{2 * n}}}{{2}}",
            f"{3 * n}/3",
            rf"{sign}\dfrac{{{size}}}{{1}}",
            f"{n}.",
            f"{n:e}",
        ),
        *(rf"{n} \times 10^{{0}}", f"\\mathbf{{{n}}}", f"{n}^\\circ", f"{n}\\%".replace("\\%", "")),
    ]


def test_long_nonsense_is_graded_at_once() -> None:
    size = 20_000
    texts = [
        *("answer: " + "(" * size, r"\boxed{" * (size // 7), "answer is " * (size // 10)),
        *("answer:" + "\n" * size + "5", "answer" + "*" * size, "answer for a " * (size // 13)),
        *("<answer>" * (size // 8), "answer: 5 (" + "ab " * size, "answer: a" + " " * size + "b"),
        *("answer: " + r"\frac{" * (size // 6), "answer: " + "9" * size, "#### " * (size // 5)),
        *(r"\boxed{9^{9^{9^{9}}}}", r"\boxed{" + "(" * 190 + "}", "answer: 1e999999999"),
        *(
            r"\boxed{" + "[(" * 150 + "}",
            "answer: 1" + " 000" * (size // 4),
            "answer 5" + "\n\n**" * size,
        ),
    ]
    began = time.perf_counter()
    for text in texts:
        assert grade(text, "7") is not True
        assert grade("answer: 7", text) is not True
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (350, 500), (10, 10), (1, 1)])
def test_wilson_interval_ends_where_the_score_test_does(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            z = (correct / total - end) / math.sqrt(end * (1 - end) / total)
            assert math.isclose(abs(z), 1.959964, rel_tol=1e-5)
