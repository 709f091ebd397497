r"""Is the answer in a response right?

:func:`marked_answer` finds it in the text; :func:`grade` compares it with the reference. Numbers
are compared by value (``1,234.50`` equals ``1234.5``, ``\frac{3}{2}`` equals ``1.5``), lists item
by item, and anything else as text without case, spaces and LaTeX's layout. If none of this tells
whether two answers are the same (``x(x+1)`` and ``x^2+x``), the verdict is None: it cannot be
judged, and is counted by itself.
"""

import re
from dataclasses import dataclass

from megatron_tropd.tasks.answers import compare, read_answer, same_text


@dataclass(frozen=True)
class Mark:
    """What a response gives as its answer."""

    text: str
    """Without what explains it."""
    whole: tuple[str, ...] = ()
    """The same with it: the line, and everything to the end. Only compared as text."""


_BOX = re.compile(r"\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{$]+)")
_TAGS = re.compile(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)</answer>")
_BETWEEN_BOXES = re.compile(r"[\s$\\()\[\]]*(?:,|;|and|or)[\s$\\()\[\]]*")
_MARK = re.compile(
    r"####|<answer>"
    r"|\banswers?\b[*_]{0,3}(?:\s+(?:to|for|of|in)\b[^.\n:=]{0,80}?)?(?:\s*\([^()\n]{0,40}\))?"
    r"[*_]{0,3}(?:\s+(?:is|are|was|equals)\b|\s*[:=]|\s+[-\u2013\u2014]+(?=\s))[*_]{0,3}(?:\s*[:=])?"
    r"|\banswers?\s+(?=[-+$]?\.?\d)"
    r"|(?P<vague>\banswer\b)"
    r"|(?:答案|答え)(?:应该|應該)?(?:是|为|為|は)?\s*[:=\uff1a]?",
    re.IGNORECASE,
)
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:#+ *)?[*_]*(?:question|problem|exercise|q|user|human|instruction)[*_]*"
    r" *\d* *[:.]"
    r"|<\|(?:im_start|start_header_id|user)",
    re.IGNORECASE,
)
_NO_CONTENT = re.compile(r"[\s.,;:!?*_)\]'\"$`>]*|\s*(?:\\[\[(]|```\w*|--+)\s*")
_EXPLANATION = re.compile(
    r"(?:,?\s+(?:because|since|which|so that|given that|due to|according to)\b"
    r"|,\s+(?:so|and so|where|as|hence|thus|therefore)\b"
    r"|(?<=[^\s,;])\s+\((?=[^()]*[^\W\d_]{2})[^()]*\)[.*_$]*\s*$"
    r"|[.!?]['\"*_)$]*\s+(?=[A-Z\\\"'(*])"
    r"|。).*",
    re.DOTALL,
)
_LONGEST_WHOLE = 2000


def marked_answer(text: str) -> Mark | None:
    r"""The answer after the last marker: ``answer is``, ``####`` or ``\boxed{``.

    A marker within a box is part of the answer, and one after which nothing stands is none. What
    follows the beginning of a next question does not count: models that were shown examples go on
    with questions of their own. The bare word "answer" marks only if there is no clearer marker.

    Returns:
        The content of the braces for ``\boxed``, else the first line after the marker without what
        explains it; None without a marker.
    """
    markers = _markers(text)
    first = next((marker.start for marker in markers if marker.clear), len(text))
    following = _NEXT_QUESTION.search(text, first)
    end = following.start() if following else len(text)
    markers = [marker for marker in markers if marker.start < end]
    for clear in (True, False):
        for marker in reversed(markers):
            if marker.clear is clear and (mark := marker.read(text[:end])) is not None:
                return mark
    return None


@dataclass(frozen=True)
class _Marker:
    """A marker in a text."""

    start: int
    after: int
    """Where its answer begins."""
    spans: tuple[tuple[int, int], ...] = ()
    """Beginnings and ends of the contents of boxes; none: the answer is a line."""
    clear: bool = True

    @property
    def end(self) -> int:
        """Up to where other markers are part of the answer."""
        return self.spans[-1][1] if self.spans else self.after

    def read(self, text: str) -> Mark | None:
        """What stands there; None if nothing does."""
        if self.spans:
            content = ", ".join(text[start:end].strip() for start, end in self.spans)
            return Mark(content) if content.strip(", ") else None
        rest = text[self.after :]
        for line in rest.lstrip().split("\n")[:4]:
            if not _NO_CONTENT.fullmatch(line):
                line = line.lstrip(" \t:=*_>").rstrip()
                if len(line) > _LONGEST_WHOLE:
                    return Mark(line)
                whole = (line, rest) if len(rest) <= _LONGEST_WHOLE else (line,)
                short = _EXPLANATION.sub("", " ".join(line.split()))
                return Mark(short.strip().rstrip("!") or line, whole)
        return None


def _markers(text: str) -> list[_Marker]:
    """Every marker outside boxes, and every box, in order."""
    boxes = _joined(_boxes(text), text)
    markers, number = list(boxes), 0
    for found in _MARK.finditer(text):
        while number < len(boxes) and boxes[number].end <= found.start():
            number += 1
        if number == len(boxes) or found.start() < boxes[number].start:
            clear = found["vague"] is None
            markers.append(_Marker(found.start(), found.end(), clear=clear))
    return sorted(markers, key=lambda marker: marker.start)


def _boxes(text: str) -> list[_Marker]:
    r"""The outermost ``\boxed{}`` and ``\fbox{}`` (one that is cut off ends with its line), and
    ``<answer></answer>``.
    """
    found_alike = (*_BARE_BOX.finditer(text), *_TAGS.finditer(text))
    boxes = [_Marker(found.start(), found.start(1), (found.span(1),)) for found in found_alike]
    depth, opened = 0, None
    for found in _BOX.finditer(text):
        brace = found[0]
        if brace.startswith("\\") and len(brace) == 2:
            continue
        if brace.startswith("\\") and opened is None:
            opened, depth = (found.start(), found.end()), 0
        if opened is None:
            continue
        depth += 1 if brace.endswith("{") else -1
        if depth == 0:
            boxes.append(_Marker(*opened, ((opened[1], found.start()),)))
            opened = None
    if opened is not None:
        line = text.find("\n", opened[1])
        boxes.append(_Marker(*opened, ((opened[1], len(text) if line < 0 else line),)))
    return sorted(boxes, key=lambda box: box.start)


def _joined(boxes: list[_Marker], text: str) -> list[_Marker]:
    r"""``\boxed{5} and \boxed{7}`` as one answer of two."""
    joined: list[_Marker] = []
    for box in boxes:
        before = joined[-1] if joined else None
        if before and _BETWEEN_BOXES.fullmatch(text, before.end + 1, box.start):
            joined[-1] = _Marker(before.start, before.after, before.spans + box.spans)
        else:
            joined.append(box)
    return joined


def grade(response: str, answer: str) -> bool | None:
    r"""Whether a response gives the reference answer.

    Args:
        answer: the reference: the answer itself, or a worked solution with a marker (GSM8K's
            ``... #### 18``).

    Returns:
        True if both are the same number, list or text; False if not, or if there is no answer;
        None if this cannot be judged.
    """
    found = marked_answer(response)
    if found is None:
        return False
    solution = marked_answer(answer)
    reference = answer if solution is None else solution.text
    texts = (found.text, *found.whole)
    if any(same_text(text, wanted) for text in texts for wanted in {reference, answer}):
        return True
    return compare(read_answer(found.text), read_answer(reference))
