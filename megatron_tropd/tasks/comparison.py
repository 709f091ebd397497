"""Two models' answers to the same problems, compared problem by problem.

Differences are paired: both models met the same problems, so what makes a problem hard for both
drops out, and the interval is that of the difference alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.tasks.answer_files import Answers, read_answers
from megatron_tropd.tasks.exact_match import GradedResponse
from megatron_tropd.tasks.scores import interval, measures_of

_Item = tuple[str, int]
"""Digest of a problem, and how many like it stand before it in the set."""


@dataclass(frozen=True)
class Difference:
    """A measure of two models."""

    a: float
    """Mean over the problems that both have."""
    b: float
    difference: float
    """b - a."""
    ci_low: float
    """Of its 95 % interval, by drawing problems anew; as the next."""
    ci_high: float
    a_better: int
    """Problems on which a has more."""
    b_better: int
    problems: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.ci_low > 0 or self.ci_high < 0


@dataclass(frozen=True)
class Comparison:
    """What two files of answers say of each other."""

    name: str
    """Of the set."""
    common: int
    """Problems that both have."""
    only_a: int
    only_b: int
    settings: dict[str, tuple[Any, Any]]
    """Those that differ, with the value of each; None: it has none."""
    measures: dict[str, Difference]

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def compare_files(a: Path, b: Path) -> list[Comparison]:
    """Compare two files of answers, or the sets of two folders that have the same names.

    Raises:
        InputError: a file is none of answers, or the sets are others.
    """
    if a.is_file() and b.is_file():
        return [compare_answers(read_answers(a), read_answers(b))]
    found = [{path.stem: path for path in sorted(folder.glob("*.jsonl"))} for folder in (a, b)]
    for folder, files in zip((a, b), found, strict=True):
        if not files:
            raise InputError(
                f"{folder} holds no answers: expected files NAME.jsonl that `tropd evaluate --out "
                "FOLDER` wrote, or a run that keeps its answers (evaluation.keep_answers)."
            )
    names = [name for name in found[0] if name in found[1]]
    if not names:
        raise InputError(
            f"{a} has the sets {', '.join(found[0])} and {b} the sets {', '.join(found[1])}: none "
            "is in both. Evaluate both models on one set."
        )
    return [compare_answers(*(read_answers(files[name]) for files in found)) for name in names]


def compare_answers(a: Answers, b: Answers) -> Comparison:
    """Compare two models on one set.

    Raises:
        InputError: the files are of different sets.
    """
    if a.name != b.name:
        raise InputError(
            f"{a.path} holds answers to the set {a.name}, {b.path} to {b.name}. Compare the same "
            "set."
        )
    mine, theirs = by_item(a.responses), by_item(b.responses)
    both = [item for item in mine if item in theirs]
    if not both:
        raise InputError(
            f"{a.path} and {b.path} both call their set {a.name}, but have no problem in common. "
            "Evaluate both models on one set."
        )
    names = sorted(a.settings.keys() | b.settings.keys())
    differing = {
        name: (a.settings.get(name), b.settings.get(name))
        for name in names
        if a.settings.get(name) != b.settings.get(name)
    }
    return Comparison(
        name=a.name,
        common=len(both),
        only_a=len(mine) - len(both),
        only_b=len(theirs) - len(both),
        settings=differing,
        measures=_differences(
            [_values(mine[item], a.samples) for item in both],
            [_values(theirs[item], b.samples) for item in both],
        ),
    )


def by_item(responses: Sequence[GradedResponse]) -> dict[_Item, list[GradedResponse]]:
    """Group answers by what their problem is, wherever it stands in its file."""
    by_index: dict[int, list[GradedResponse]] = {}
    for response in responses:
        by_index.setdefault(response.prompt_index, []).append(response)
    found: dict[_Item, list[GradedResponse]] = {}
    for index in sorted(by_index):
        item, number = by_index[index][0].item, 0
        while (item, number) in found:
            number += 1
        found[item, number] = by_index[index]
    return found


def _values(responses: Sequence[GradedResponse], samples: int) -> dict[str, float]:
    """The measures of one problem, lengths among them."""
    judged = [response for response in responses if not response.error]
    return {
        **(measures_of(judged, samples) if judged else {}),
        "response_length": sum(r.tokens for r in responses) / len(responses),
        "truncated_share": sum(r.finish_reason == "length" for r in responses) / len(responses),
    }


def _differences(
    mine: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> dict[str, Difference]:
    names = dict.fromkeys(name for values in mine for name in values)
    found = {}
    for name in names:
        pairs = [
            (one[name], other[name])
            for one, other in zip(mine, theirs, strict=True)
            if name in one and name in other
        ]
        if pairs:
            found[name] = _difference(pairs)
    return found


def _difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    gaps, count = [b - a for a, b in pairs], len(pairs)
    low, high = interval(gaps)
    return Difference(
        a=sum(a for a, _ in pairs) / count,
        b=sum(b for _, b in pairs) / count,
        difference=sum(gaps) / count,
        ci_low=low,
        ci_high=high,
        a_better=sum(gap < 0 for gap in gaps),
        b_better=sum(gap > 0 for gap in gaps),
        problems=count,
    )
