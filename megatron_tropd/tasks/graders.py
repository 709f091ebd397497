r"""Graders: is the answer in a response right?

A grader finds the answer in a text; :func:`grade` compares it with the reference. Numbers are
compared by value (``1,234.50`` equals ``1234.5``), anything else letter by letter without case
and spaces.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from megatron_tropd.errors import ConfigError

Grader = Callable[[str], str | None]
"""Text -> the answer in it, or None where there is none."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
_MARKER = re.compile(r"\\boxed\s*\{|####|\banswer\b(?:\s+is\b)?\s*[:=]?", re.IGNORECASE)


def last_number(text: str) -> str | None:
    """The last number anywhere in the text.

    Args:
        text: a response.

    Returns:
        The number as written, or None.
    """
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""The answer after the last marker: ``answer``, ``####`` or ``\boxed{``.

    Args:
        text: a response.

    Returns:
        The last number between the marker and the end of its line (of its braces for
        ``\boxed``), or what stands there where it holds no number; None without a marker.
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    marker = markers[-1]
    rest = text[marker.end() :]
    marked = _braced(rest) if marker.group().startswith("\\") else rest.strip().split("\n")[0]
    return last_number(marked) or marked.strip() or None


def _braced(text: str) -> str:
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:position]
    return text


GRADERS: dict[str, Grader] = {"marked": marked_answer, "last_number": last_number}
"""By the name used in settings. ``marked`` is the default: an answer nobody announced is wrong."""


def grade(response: str, answer: str, *, grader: str = "marked") -> bool:
    r"""Whether a response gives the reference answer.

    Args:
        response: what the model wrote.
        answer: the reference: the answer itself, or a worked solution with a marker (GSM8K's
            ``... #### 18``).
        grader: a key of :data:`GRADERS`, applied to the response.

    Returns:
        True where both are the same number, or the same text.

    Raises:
        ConfigError: no grader of that name.
    """
    if grader not in GRADERS:
        raise ConfigError(f"Unknown grader {grader!r}. Known: {', '.join(GRADERS)}.")
    found = GRADERS[grader](response)
    return found is not None and _canonical(found) == _canonical(marked_answer(answer) or answer)


def _canonical(text: str) -> Decimal | str:
    compact = "".join(text.split()).casefold().strip("$.")
    number = compact.removesuffix("%").replace(",", "")
    return Decimal(number) if _NUMBER.fullmatch(number) else compact
