"""Graders by name: their verdicts, and what becomes of one that crashes or hangs."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tropd.base import workers
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import GraderConfig
from megatron_tropd.data.samples import Sample
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks import sandbox
from megatron_tropd.tasks.exact_match import grade_answers
from megatron_tropd.tasks.grading import Grader, grader_of

OWN = """
import os, time


def graded(response, problem):
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(7)
    if response == "raise":
        raise ValueError("no such case")
    if response == "odd":
        return "yes"
    if response == "flood":
        print("x" * 100_000)
    return None if response == "open" else problem["wanted"] in response


stranger = 3
"""

MATHEMATICS = r"""
yes | \boxed{x(x+1)} | x^2+x
yes | \boxed{(x+1)^2} | x^2+2x+1
no | \boxed{(x+1)^2} | x^2+1
yes | \boxed{1+x} | x+1
yes | \boxed{\frac{x^2-1}{x-1}} | x+1
yes | \boxed{\frac{1}{\sqrt{2}}} | \frac{\sqrt{2}}{2}
yes | \boxed{\frac{1}{1+\sqrt{2}}} | \sqrt{2}-1
yes | \boxed{2\sqrt{3}} | \sqrt{12}
yes | \boxed{\sqrt[3]{8}} | 2
no | \boxed{\sqrt[3]{8}} | 3
yes | \boxed{5!} | 120
no | \boxed{5!} | 5
yes | \boxed{|{-5}|} | 5
yes | \boxed{\sin^2 x + \cos^2 x} | 1
yes | \boxed{\log_2 8} | 3
yes | \boxed{e^{2x}} | (e^x)^2
yes | \boxed{2\pi r} | 2r\pi
no | \boxed{\pi r^2} | 2\pi r
yes | \boxed{a^2-b^2} | (a-b)(a+b)
no | \boxed{x^2+1} | x^2+2
yes | \boxed{(3,4)\cup(1,2)} | (1,2)\cup(3,4)
no | \boxed{(1,2)\cup(3,4)} | (1,2)\cup(3,5)
yes | \boxed{(-\infty,1)\cup(2,\infty)} | (-\infty, 1) \cup (2, \infty)
no | \boxed{(-\infty,1)} | (-\infty,1]
yes | \boxed{[0,5)} | [0, 5)
no | \boxed{[0,5)} | (0,5)
yes | \boxed{(-\infty, 3]} | (-\infty,3]
yes | \boxed{\{1,2\}} | \{2,1\}
no | \boxed{\{1,2\}} | \{1,3\}
yes | \boxed{\{x+1, 2\}} | \{2, 1+x\}
yes | \boxed{(1,2)} | (1, 2)
no | \boxed{(1,2)} | (2,1)
yes | \boxed{\left(\frac12, 3\right)} | (0.5, 3)
yes | \boxed{\begin{pmatrix}1\\2\end{pmatrix}} | \begin{pmatrix}1\\2\end{pmatrix}
no | \boxed{\begin{pmatrix}1\\2\end{pmatrix}} | \begin{pmatrix}1\\3\end{pmatrix}
yes | \boxed{\frac{3}{4}} | 0.75
yes | \boxed{\dfrac{3}{4}} | \tfrac34
yes | \boxed{1\frac{1}{2}} | 1.5
no | \boxed{\frac{1}{2}} | 2
yes | \boxed{-\frac{1}{2}} | -0.5
yes | answer: 1,234,567 | 1234567
yes | \boxed{10{,}000} | 10,000
yes | \boxed{1.5\times10^{3}} | 1500
yes | \boxed{50\%} | 0.5
no | answer: 5% | 50%
yes | \boxed{\$18} | 18
yes | The answer is $18.00 | 18
yes | answer: 5 million | 5000000
no | answer: 5 million | 5
yes | \boxed{10\text{ cm}^2} | 10
yes | answer: 60 km/h | 60
yes | \boxed{45^\circ} | 45
? | answer: 100 cm | 1 m
? | answer: 10 cm | 10 m
yes | \boxed{x = 5} | 5
yes | \boxed{x = 5, y = 7} | 5, 7
no | \boxed{x = 5} | 6
? | \boxed{2x = 10} | 10
? | answer: 6=5 | 5
? | \boxed{0.33} | 1/3
yes | \boxed{1/3} | 0.333333
? | answer: 3,5 | 3.5
? | \boxed{101_2} | 101
? | answer: 10m | 10
? | answer: the square of 5 | 5
? | answer: it cannot be 5 | 5
? | \boxed{(1,2)} | 1,2
no | \boxed{x < 5} | x > 5
yes | \boxed{x \leq 5} | x \le 5
yes | \boxed{2+3i} | 3i+2
no | \boxed{2+3i} | 2-3i
yes | 16 - 3 - 4 = 9, 9 * 2 = 18. #### 18 | She makes 9 * 2 = $<<9*2=18>>18.\n#### 18
yes | Answer: (B) | B
yes | <answer>42</answer> | 42
no | 42 | 42
"""


@pytest.fixture(scope="module")
def mathematics() -> Grader:
    pytest.importorskip("math_verify")
    return Grader(GraderConfig(name="math", timeout_seconds=30.0))


def test_real_forms_of_answers_get_the_right_verdict(mathematics: Grader):
    rows = [line.split(" | ") for line in MATHEMATICS.strip().splitlines()]
    pairs = [(response, {"answer": answer}) for _, response, answer in rows]
    found = mathematics.grade_all(pairs)
    said = {True: "yes", False: "no", None: "?"}
    wrong = [
        (row, grade)
        for row, grade in zip(rows, found, strict=True)
        if said[grade.correct] != row[0] or grade.error
    ]
    assert len(rows) >= 60
    assert not wrong, "\n".join(map(str, wrong))


def test_what_our_rules_decide_is_not_asked_again(mathematics: Grader):
    """Numbers, words and letters keep the verdict of "marked"; math-verify would take 40 of them
    for different and one wrong pair for equal.
    """
    from test_graders import CANNOT_JUDGE, DIFFERENT, SAME, _pairs

    for table, verdict in ((SAME, True), (DIFFERENT, False)):
        pairs = [(response, {"answer": answer}) for response, answer in _pairs(table)]
        assert {grade.correct for grade in mathematics.grade_all(pairs)} == {verdict}
    open_pairs = [pair for pair in _pairs(CANNOT_JUDGE) if "9^{9^" not in pair[0]]  # a tower
    found = mathematics.grade_all([(one, {"answer": other}) for one, other in open_pairs])
    right = [p for p, grade in zip(open_pairs, found, strict=True) if grade.correct]
    assert right == [(r"\boxed{x+1}", "1+x"), ("answer: |5|", "5")]


def test_a_tower_that_never_ends_is_an_error_and_the_next_is_graded():
    pytest.importorskip("math_verify")
    grader = Grader(GraderConfig(name="math", timeout_seconds=3.0))
    tower = r"\boxed{x + 9^{9^{9^{9}}} - 7^{9^{9^9}}}"
    found = grader.grade(tower, {"answer": "x + 9^{9^{9^{9}}}"})
    assert found.correct is None and found.error
    assert grader.grade(r"\boxed{1+x}", {"answer": "x+1"}).correct is True


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Grader:
    (tmp_path / "own_grader.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_grader", None)
    return Grader(GraderConfig(name="own_grader:graded", timeout_seconds=2.0))


def test_a_grader_of_one_s_own_fails_without_a_verdict(own: Grader):
    problem = {"wanted": "5"}
    for response, correct in (("5", True), ("6", False), ("open", None), ("flood 5", True)):
        assert own.grade(response, problem).correct is correct
        assert not own.grade(response, problem).error
    for response, error in (
        ("die", "ended with code 7"),
        ("hang", r"no verdict within grader.timeout_seconds = 2"),
        ("raise", "ValueError: no such case"),
        ("odd", "expected True, False or None"),
    ):
        found = own.grade(response, problem)
        assert found.correct is None and error in found.error
        assert own.grade("5", problem).correct is True, "the next has a new process"


class _Tokenizer:
    """Ids are places in a list of texts."""

    texts = ("5", "6", "die", "5")

    def decode(self, ids: list[int], **_: object) -> str:
        """The text of an id."""
        return self.texts[ids[0]]


def test_failures_are_counted_and_change_no_accuracy(own: Grader, capsys):
    problems = [Prompt(i, "x", (1,), {"answer": "5", "wanted": "5"}) for i in range(4)]
    samples = [Sample((i,), (0.0,), "stop") for i in range(4)]
    result = grade_answers(problems, samples, _Tokenizer(), own)  # type: ignore[arg-type]
    assert (result.correct, result.grader_errors, result.unjudged, result.total) == (2, 1, 0, 4)
    assert result.accuracy == 2 / 3
    assert "code 7" in result.responses[2].error and result.responses[2].correct is None
    assert "no verdict on 1 of 4 answers" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no verdict on 1 of 1 answers: .*code 7"):
        grade_answers(problems[2:3], samples[2:3], _Tokenizer(), own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "response", "answer", "correct"),
    [
        ("choice", "The answer is (B).", "B", True),
        ("choice", "<think>A? no</think>\nB", "b", True),
        ("choice", "**C**", "B", False),
        ("choice", r"\boxed{\text{(C)}}", "C", True),
        ("choice", "Answer: A and C", "A", None),
        ("choice", "I do not know", "A", False),
        ("exact", "<think>x</think> New York\n", "New York", True),
        ("exact", "new york", "New York", False),
        ("last_number", "3 apples and 4 pears make 7 fruits", "7", True),
        ("last_number", "so $1,234.50.", 1234.5, True),
        ("last_number", "7 or 8", "7", False),
        ("last_number", "none", "7", False),
        ("last_number", "it is 18", "a long solution 3\n#### 18", True),
        ("last_number", "<think>18</think> it is -17", "-17", True),
        ("marked", "The answer is 18", "18", True),
    ],
)
def test_graders_within_the_process(name: str, response: str, answer, correct: bool | None):
    grader = grader_of(GraderConfig(name=name))
    grader.check({"answer": answer}, "here")
    assert grader.grade(response, {"answer": answer}).correct is correct


def test_a_pattern_finds_the_answer_and_may_not_hang():
    grader = Grader(GraderConfig(name="regex", pattern=r"ans=(\S+)", timeout_seconds=5.0))
    assert grader.grade("ans=3 then ans=0.50", {"answer": "1/2"}).correct is True
    assert grader.grade("ans=3", {"answer": "4"}).correct is False
    assert grader.grade("3", {"answer": "3"}).correct is False
    slow = Grader(GraderConfig(name="regex", pattern=r"(a+)+$", timeout_seconds=1.0))
    found = slow.grade("a" * 40 + "b", {"answer": "a"})
    assert found.correct is None and "no verdict within" in found.error


TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
TWICE = "```py\nprint(int(input()) * 2)\n```"
GOOD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


@pytest.mark.parametrize(
    ("response", "answer", "passes"),
    [
        (GOOD, TESTS, True),
        (GOOD, TESTS.splitlines(), True),
        (GOOD.replace("+", "-"), TESTS, False),
        (GOOD.replace("return", "exit(0)  #"), TESTS, False),
        ("```\nimport os; os._exit(0)\n```", TESTS, False),
        ("no program", TESTS, False),
        ("```python\nwhile True: pass\n```", TESTS, False),
        ("```python\nimport time; time.sleep(99)\n```", TESTS, False),
        ("```python\nb = bytearray(2**33)\n```" + GOOD[5:], TESTS, True),  # the last block counts
        ("```python\nb = bytearray(2**33)\ndef add(a, b): return a + b\n```", TESTS, False),
        ("```python\nwhile True: print('x' * 10**6)\n```", TESTS, False),
        (TWICE, {"inputs": ["2\n", "5"], "outputs": ["4", "10\n"]}, True),
        (TWICE, '{"inputs": ["2"], "outputs": ["5"]}', False),
        ("```python\nimport os\nassert 'SECRET' not in os.environ\n```", "pass", True),
    ],
)  # fmt: skip
def test_programs_are_graded_by_their_tests(response, answer, passes: bool, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    seconds = 30.0 if passes else 2.0
    grader = Grader(GraderConfig(name="code", timeout_seconds=seconds, memory_mib=512))
    grader.check({"answer": answer}, "here")
    began = time.monotonic()
    found = grader.grade(response, {"answer": answer})
    assert (found.correct, found.error) == (passes, "") and time.monotonic() - began < 40


@pytest.mark.needs("namespaces")
def test_programs_have_no_network_where_the_system_allows_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('in')"
        assert sandbox.run_program(program, "", seconds=20, memory_mib=512) is None
        socket.create_connection(("127.0.0.1", port), 2).close()


def test_what_a_program_started_ends_with_it(tmp_path: Path):
    """Also if it left the session: where a user may have a namespace of processes."""
    left = tmp_path / "left"
    child = f"import time; time.sleep(3); open({str(left)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], "
    for apart in (False, True) if sandbox.network_is_off() else (False,):
        ended = program + f"start_new_session={apart})\nprint('done')"
        assert sandbox.run_program(ended, "", seconds=60, memory_mib=512) == "done\n"
    time.sleep(5)
    assert not left.exists()


def test_a_program_that_could_not_be_started_is_told_from_one_that_fails(monkeypatch):
    """Whether its limits or its namespaces failed; a program may end with any code."""
    ended = "import sys; sys.exit(1)"
    assert sandbox.run_program(ended, "", seconds=60, memory_mib=512) is None
    with pytest.raises(sandbox.SandboxError, match="could not be started"):
        sandbox.run_program("", "", seconds=60, memory_mib=2**60)
    monkeypatch.setattr(sandbox, "_apart", lambda: ("sh", "-c", "echo no space >&2; exit 1"))
    with pytest.raises(sandbox.SandboxError, match="could not be started: no space"):
        sandbox.run_program("", "", seconds=60, memory_mib=512)
    monkeypatch.setattr(sandbox, "_apart", lambda: ("sleep", "30"))
    with pytest.raises(sandbox.SandboxError, match="started"):
        sandbox.run_program("", "", seconds=1, memory_mib=512)
    grader = Grader(GraderConfig(name="code", timeout_seconds=1.0))
    assert grader.grade(GOOD, {"answer": TESTS}).correct is None


def test_programs_that_have_the_network_are_announced(monkeypatch, capsys):
    for off, said in ((False, True), (True, False)):
        monkeypatch.setattr(sandbox, "network_is_off", lambda off=off: off)
        Grader(GraderConfig(name="code"))
        assert ("have the network" in capsys.readouterr().err) is said


def test_a_worker_that_does_not_start_is_ended(own: Grader, monkeypatch):
    monkeypatch.setattr(workers, "START_SECONDS", 0.0)
    started = []
    popen = subprocess.Popen

    def kept(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", kept)
    assert "no verdict" in own.grade("x", {}).error
    assert [process.returncode for process in started] == [-9]


def test_a_sandbox_that_cannot_start_is_an_error_and_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "_apart", lambda: ("/nonexistent/unshare",))
    found = Grader(GraderConfig(name="code")).grade(GOOD, {"answer": TESTS})
    assert found.correct is None and "nonexistent" in found.error


@pytest.mark.parametrize(
    ("settings", "problem", "message"),
    [
        ({}, {"prompt": "x"}, 'line 4 needs an "answer", a string or a number, found none'),
        ({}, {"answer": True}, "found True"),
        ({}, {"answer": float("nan")}, "found nan"),
        ({"name": "choice"}, {"answer": "Paris"}, "compares letters, found .answer. 'Paris'"),
        ({"name": "last_number"}, {"answer": "none"}, "expected an answer with a number"),
        ({"name": "code"}, {"answer": {"inputs": []}}, "line 4: grader.name = .code. expects"),
    ],
)
def test_problems_that_a_grader_cannot_use_are_refused(settings, problem, message: str):
    with pytest.raises(InputError, match=message):
        Grader(GraderConfig(**settings)).check(problem, "line 4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "maths"}, "expected one of marked, math, choice, exact, last_number, regex"),
        ({"name": "absent_module:f"}, "cannot be imported: No module named 'absent_module'"),
        ({"name": "regex"}, 'grader.pattern is for grader.name = "regex"'),
        ({"pattern": "x"}, 'grader.pattern is for grader.name = "regex"'),
        ({"name": "regex", "pattern": "("}, "is not valid: missing"),
    ],
)
def test_graders_that_do_not_exist(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        Grader(GraderConfig(**settings))


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-tropd\[tasks\]'"):
        Grader(GraderConfig(name="math"))


def test_gsm8k_s_solutions_are_graded_by_their_last_number(shared_data: Path):
    file = shared_data / "gsm8k" / "test.jsonl"
    solutions = [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    grader = Grader(GraderConfig(name="last_number"))
    assert all(grader.grade(text, {"answer": text}).correct for text in solutions)
    assert len(solutions) == 1319
