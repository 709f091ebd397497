"""Files of graded answers: one set of problems and one model each, a line for every answer.

The first line says what was asked of which model; `tropd compare` reads two of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.files import replace_text
from megatron_tropd.base.text_files import parse_json_line
from megatron_tropd.data.resumable import line_of
from megatron_tropd.data.samples import Sample
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.exact_match import (
    Asking,
    GradedResponse,
    Sampler,
    grade_samples,
    set_digest,
)
from megatron_tropd.tasks.grading import Grader
from megatron_tropd.tasks.sample_files import WantedSample, write_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = "tropd-answers-1"
_ONLY = "heldout"
_KEY = ("prompt_index", "sample")


def file_name(name: str) -> str:
    """Name the file of a set; of the only one, which has no name: heldout.jsonl."""
    return f"{name or _ONLY}.jsonl"


def header_of(
    name: str, problems: Sequence[Prompt], settings: Mapping[str, Any], model: str
) -> dict[str, Any]:
    """Make the first line of a file.

    Args:
        settings: what decides the answers beside model and problems.
        model: digest of whoever answers.
    """
    asked = {"model": model, "problems_digest": set_digest(problems), **settings}
    return {"format": _FORMAT, "set": name or _ONLY, "settings": asked}


def write_answers(
    engine: Callable[[], Sampler],
    problems: Sequence[Prompt],
    asking: Asking,
    tokenizer: "PreTrainedTokenizerBase",
    grader: Grader,
    path: Path,
    *,
    header: Mapping[str, Any],
    engines: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Ask for and grade the answers that a file does not have yet.

    Args:
        engine: makes an engine; not called if nothing is missing.
        engines: how many share the work.

    Raises:
        InputError: as ``write_samples``.
    """
    asked = [(problem, number) for problem in problems for number in range(asking.samples)]

    def record(problem: Prompt, number: int, sample: Sample) -> dict[str, Any]:
        return {"problem": problem, "number": number, "sample": sample}

    def judge(found: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        columns = [[each[name] for each in found] for name in ("problem", "sample", "number")]
        graded = grade_samples(columns[0], columns[1], tokenizer, grader, columns[2])
        return [asdict(response) for response in graded]

    wanted = [
        WantedSample((problem.index, number), request, partial(record, problem, number))
        for (problem, number), request in zip(asked, asking.requests(problems), strict=True)
    ]
    write_samples(
        engine,
        wanted,
        path,
        header=header,
        key=_KEY,
        sampling=asking.sampling,
        judge=judge,
        engines=engines,
        progress=progress,
    )


def dump_answers(
    path: Path, header: Mapping[str, Any], responses: Sequence[GradedResponse]
) -> None:
    """Write a whole file at once; an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line_of(header), *(line_of(asdict(response)) for response in responses)]
    replace_text(path, b"".join(lines).decode())


@dataclass(frozen=True)
class Answers:
    """A file that was read."""

    path: Path
    name: str
    """Of the set."""
    settings: dict[str, Any]
    responses: list[GradedResponse]

    @property
    def samples(self) -> int:
        """Answers asked of each problem."""
        return int(self.settings.get("samples", 1))


def read_answers(path: Path) -> Answers:
    """Read a file of answers; a line torn by a kill is left out.

    Raises:
        InputError: it is none.
    """
    try:
        first, *lines = path.read_bytes().split(b"\n")[:-1]
    except (OSError, ValueError):
        raise _no_answers(path) from None
    header = parse_json_line(first, f"{path}, line 1")
    settings = header.get("settings")
    if header.get("format") != _FORMAT or not isinstance(settings, dict):
        raise _no_answers(path)
    records = [parse_json_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 2)]
    try:
        responses = [GradedResponse.of_line(record) for record in records]
    except TypeError as error:
        raise InputError(f"{path}: a line is no answer ({error}). Evaluate again.") from None
    return Answers(path, str(header["set"]), settings, responses)


def _no_answers(path: Path) -> InputError:
    return InputError(
        f"{path} is no file of answers: expected one that `tropd evaluate --out FOLDER` or a run "
        "wrote. Give such a file, or the folder of several."
    )
