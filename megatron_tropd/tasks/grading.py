"""Graders by name: what `[grader]` chooses, and what becomes of one that crashes or hangs.

A grader says True, False, or None if it cannot tell. Those that run code of others (mathematics by
`math-verify`, a regular expression, a function of the user's, a program of the model's) run in
processes of their own, with limits. One that dies, raises or exceeds its time gives no verdict but
an error, which is counted by itself: it must not pass for a wrong answer.
"""

import importlib.util
import math
import queue
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.parts import load_part
from megatron_tropd.base.workers import Reply, Worker, WorkerError
from megatron_tropd.config import GraderConfig
from megatron_tropd.tasks import sandbox
from megatron_tropd.tasks.answers import Choice, Listing, Number, compare, read_answer, same_text
from megatron_tropd.tasks.graders import grade, marked_answer

_WORKERS = 4
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\s?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_END_OF_THOUGHT = "</think>"
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
"""A word; names of functions and constants are none."""
_NO_PROSE = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos"),
        *("arctan", "log", "ln", "exp", "sqrt", "pi", "inf", "infty", "pmatrix", "bmatrix"),
    )
)
_MARKUP = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}")
_AMBIGUOUS = re.compile(
    r"(?<![_^])\d \d|\d\.\d+\.|[\"'`:%=]|\d_|/\s*\d+\s*[a-z(]|^\d+ ?- ?\d+$|^[^a-z\\]*,[^a-z\\]*$"
    r"|^-?[\d.]+ *[a-z]$"
)
"""What math-verify reads in one of several ways, or takes as a chain of which it reads the end:
2x = 10, 5-7, 1/2x, 10m, 101_2, and lists of numbers, of which our own rules say what can be
said."""


class GraderError(Exception):
    """A grader gave no verdict."""


@dataclass(frozen=True)
class Grade:
    """What a grader says of a response."""

    correct: bool | None
    """None: it cannot tell, or gave no verdict."""
    error: str = ""
    """Why it gave none."""


class Grader:
    """The grader that some settings choose."""

    def __init__(self, config: GraderConfig) -> None:
        """Check that there is such a grader; start nothing.

        Raises:
            ConfigError: there is none, or it lacks a package or a setting.
        """
        self._config = config
        known = config.name in _RULES or ":" in config.name
        if not known:
            raise ConfigError(
                f"grader.name = {config.name!r}: expected one of {', '.join(_RULES)}, or "
                '"package.module:function" of your own.'
            )
        if ":" in config.name:
            load_part("", config.name, attribute="", setting="grader.name")
        if config.name == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "grader.name = \"math\" needs math-verify: pip install 'megatron-tropd[tasks]'."
            )
        if config.name == "code" and not sandbox.network_is_off():
            print(
                'tropd: warning: grader.name = "code" runs what the model writes, and this system '
                "gives those programs no namespaces (`unshare --map-root-user --net` fails): they "
                "have the network of this machine. Run the job in a container.",
                file=sys.stderr,
            )
        self._rule = _RULES.get(config.name, _by_function)
        self._workers = _Workers(config)

    def check(self, problem: Mapping[str, Any], where: str) -> None:
        """Refuse a problem whose reference this grader cannot use.

        Raises:
            InputError: there is no such answer.
        """
        if ":" in self._config.name:  # it may look at any field
            return
        answer = problem.get("answer")
        if self._config.name == "code":
            with _naming(where):
                sandbox.tests_of(answer)
            return
        usual = isinstance(answer, str | int | float) and not isinstance(answer, bool)
        usual = usual and (not isinstance(answer, float) or math.isfinite(answer))
        if not usual or not str(answer).strip():
            found = repr(answer)[:60] if "answer" in problem else "none"
            raise InputError(
                f'{where} needs an "answer", a string or a number, found {found}. Add it, or use '
                'evaluation.task = "reverse_kl".'
            )
        if self._config.name == "choice" and _letter(str(answer)) is None:
            raise InputError(
                f'{where}: grader.name = "choice" compares letters, found "answer" {answer!r:.60}. '
                "Write the letter of the option."
            )
        if self._config.name == "last_number" and _last_number(str(answer)) is None:
            raise InputError(f"{where}: expected an answer with a number, found {answer!r:.60}.")

    def grade(self, response: str, problem: Mapping[str, Any]) -> Grade:
        """Grade one response.

        Args:
            problem: fields of its line; "answer" is the reference.
        """
        try:
            return Grade(self._rule(self, response, problem))
        except GraderError as error:
            return Grade(None, " ".join(str(error).split())[:300])

    def grade_all(self, pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Grade]:
        """Grade responses to problems, some at once."""
        with ThreadPoolExecutor(_WORKERS) as threads:
            return list(threads.map(lambda pair: self.grade(*pair), pairs))

    def given(self, response: str) -> str | None:
        """Return what a response gives as its answer ("": nothing); None: the grader knows none."""
        read = _GIVEN.get(self._config.name)
        if read is None:
            return None
        try:
            return read(self, response) or ""
        except GraderError:
            return ""

    def ask(self, **request: Any) -> bool | None:
        """Have a worker answer.

        Raises:
            GraderError: it died, raised or took too long.
        """
        return self._workers.ask(request)

    @property
    def config(self) -> GraderConfig:
        """Its settings."""
        return self._config


@lru_cache
def grader_of(config: GraderConfig) -> Grader:
    """Make the grader of some settings, once in a process."""
    return Grader(config)


class _naming:
    """Put a name before the message of an InputError."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, InputError):
            raise InputError(f"{self._where}: {error}") from None


# ---------------------------------------------------------------- rules


def _reference(problem: Mapping[str, Any]) -> str:
    return str(problem.get("answer"))


def _said(response: str) -> str:
    """What follows a thought."""
    return response.rpartition(_END_OF_THOUGHT)[2]


def _by_mark(_: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    return grade(response, _reference(problem))


def _by_mathematics(grader: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    """Our own verdict; what it leaves open is asked of math-verify, if both are mathematics."""
    answer = _reference(problem)
    verdict, found = grade(response, answer), marked_answer(response)
    if verdict is not None or found is None:
        return verdict
    solution = marked_answer(answer)
    reference = answer if solution is None else solution.text
    if not may_be_asked(found.text, reference):
        return None
    return grader.ask(kind="math", response=found.text, answer=reference)


def may_be_asked(one: str, other: str) -> bool:
    """Whether math-verify is asked: formulas without words, in like brackets, none a mere number.

    Of two numbers our rules know more: 0.33 may be said for 1/3, or in error.
    """
    read = [read_answer(text) for text in (one, other)]
    if all(isinstance(answer, Number) for answer in read):
        return False
    brackets = {answer.brackets if isinstance(answer, Listing) else None for answer in read}
    return len(brackets) == 1 and _is_formula(one) and _is_formula(other)


def _is_formula(text: str) -> bool:
    words = {word.lower() for word in _PROSE.findall(text)} - _NO_PROSE
    return not words and not _MARKUP.search(text) and not _AMBIGUOUS.search(text)


def _by_choice(_: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    found = _chosen(_said(response))
    if found is None:
        return False if marked_answer(_said(response)) is None else None
    return found == _letter(_reference(problem))


def _chosen(said: str) -> str | None:
    """The letter after the mark, or in the last line."""
    mark = marked_answer(said)
    return _letter(said.strip().rpartition("\n")[2] if mark is None else mark.text)


def _letter(text: str) -> str | None:
    mark = marked_answer(text)
    answer = read_answer(text if mark is None else mark.text)
    return answer.letter if isinstance(answer, Choice) else None


def _by_equality(_: Grader, response: str, problem: Mapping[str, Any]) -> bool:
    return _said(response).strip() == _reference(problem).strip()


def _by_last_number(_: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    found, wanted = _last_number(_said(response)), _last_number(_reference(problem))
    return False if found is None or wanted is None else compare(found, wanted)


def _last_number(text: str) -> Number | None:
    answer = read_answer(_last_literal(text) or "")
    return answer if isinstance(answer, Number) else None


def _last_literal(text: str) -> str | None:
    literals = (literal.rstrip(",") for literal in reversed(_NUMBER.findall(text)))
    return next((one for one in literals if isinstance(read_answer(one), Number)), None)


def _matched(grader: Grader, response: str) -> str | None:
    """The last match of the pattern."""
    found: str | None = grader._workers.request({"kind": "regex", "response": response})["found"]
    return found


def _by_expression(grader: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    """The last match of the pattern, compared as a marked answer is."""
    found = _matched(grader, response)
    if found is None:
        return False
    answer = _reference(problem)
    if same_text(found, answer):
        return True
    return compare(read_answer(found), read_answer(answer))


def _by_program(grader: Grader, response: str, problem: Mapping[str, Any]) -> bool:
    config = grader.config
    try:
        return sandbox.passes(
            sandbox.code_of(_said(response)),
            sandbox.tests_of(problem.get("answer")),
            seconds=config.timeout_seconds,
            memory_mib=config.memory_mib,
        )
    except (OSError, sandbox.SandboxError) as error:
        raise GraderError(str(error)) from None


def _by_function(grader: Grader, response: str, problem: Mapping[str, Any]) -> bool | None:
    return grader.ask(kind="function", response=response, problem=dict(problem))


_RULES: dict[str, Callable[[Grader, str, Mapping[str, Any]], bool | None]] = {
    "marked": _by_mark,
    "math": _by_mathematics,
    "choice": _by_choice,
    "exact": _by_equality,
    "last_number": _by_last_number,
    "regex": _by_expression,
    "code": _by_program,
}


def _marked(_: Grader, response: str) -> str | None:
    mark = marked_answer(response)
    return None if mark is None else mark.text


_GIVEN: dict[str, Callable[[Grader, str], str | None]] = {
    "marked": _marked,
    "math": _marked,
    "choice": lambda _, response: _chosen(_said(response)),
    "exact": lambda _, response: _said(response).strip(),
    "last_number": lambda _, response: _last_literal(_said(response)),
    "regex": _matched,
}
"""What a response gives as its answer; what programs and functions of the user's do, none says."""


# ---------------------------------------------------------------- workers


class _Workers:
    """Processes that grade, each one request at a time; started when they are needed."""

    def __init__(self, config: GraderConfig) -> None:
        self._config = config
        self._settings = {"name": config.name, "pattern": config.pattern, "mib": config.memory_mib}
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(_WORKERS):
            self._idle.put(None)

    def ask(self, request: Mapping[str, Any]) -> bool | None:
        """The verdict of a worker."""
        verdict = self.request(request)["correct"]
        if verdict not in (True, False, None):
            raise GraderError(f"expected True, False or None of the grader, found {verdict!r:.60}")
        return verdict

    def request(self, request: Mapping[str, Any]) -> Reply:
        """The reply of a worker, which is put back if it lives.

        Raises:
            GraderError: there is none.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                worker = Worker("megatron_tropd.tasks.grading_worker", self._settings)
            return worker.request(request, self._config.timeout_seconds)
        except WorkerError as error:
            if worker is not None and error.kind not in ("raised", "refused"):
                worker.close()
                worker = None
            raise GraderError(_why(error, self._config)) from None
        finally:
            self._idle.put(worker)


def _why(error: WorkerError, config: GraderConfig) -> str:
    if error.kind == "timeout":
        return f"no verdict within grader.timeout_seconds = {config.timeout_seconds:g}"
    return f"the grader: {error}" if error.kind in ("died", "flooded") else str(error)
