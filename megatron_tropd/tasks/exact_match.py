"""Exact-match accuracy: answers to held-out problems, graded."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import GraderConfig
from megatron_tropd.config.settings import Amount, Anything, Count, Number, Settings, Share
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.tasks.grading import Grade, Grader, grader_of
from megatron_tropd.tasks.scores import interval, measures, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sampler(Protocol):
    """Anything that continues requests; the rollout room's engines do."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """One sample per request, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asking(Settings):
    """How problems are asked."""

    max_new_tokens: Count
    """Longest answer."""
    stop_token_ids: tuple[Number, ...]
    """Ids that end an answer, EOS included."""
    samples: Count = 1
    """Answers to each problem."""
    temperature: Amount = 0.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Nucleus; 1 is off."""
    seed: Anything = 0
    """Keys the samples, with problem and number of the sample."""

    @property
    def sampling(self) -> Sampling:
        """What all requests share."""
        return Sampling(self.temperature, self.top_p, self.stop_token_ids)

    def requests(self, problems: Sequence[Prompt]) -> list[SampleRequest]:
        """Make ``samples`` requests of each problem, one problem after the other."""
        return [
            SampleRequest(p.token_ids, self.max_new_tokens, self._seed_of(p, number))
            for p in problems
            for number in range(self.samples)
        ]

    def _seed_of(self, problem: Prompt, number: int) -> int:
        if not self.temperature:
            return 0
        return keyed_seed(self.seed, Purpose.EVALUATION, problem.index, number)


@dataclass(frozen=True)
class GradedResponse:
    """One answer to a problem and what became of it; a line of a file of answers."""

    prompt_index: int
    prompt: str
    """The problem as the model saw it."""
    response: str
    """What the model wrote, special tokens left out."""
    answer: str
    correct: bool | None
    """The grader's verdict; None: it cannot judge."""
    finish_reason: str
    """"stop" or "length"."""
    error: str = ""
    """Why the grader gave no verdict, if it failed."""
    given: str | None = None
    """What the response gives as its answer ("" if nothing); None: this grader does not say."""
    sample: int = 0
    """0-based among the answers to the problem."""
    tokens: int = 0
    """Of the response."""
    item: str = ""
    """Digest of the problem: the same in every file that has it."""

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> "GradedResponse":
        """Return what a line of a file says."""
        return cls(**{f.name: line[f.name] for f in fields(cls) if f.name in line})


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy on a set of problems."""

    accuracy: float
    """Mean over problems of the share of their answers that is right, 0..1: what cannot be judged
    is not right; answers at which the grader failed do not count."""
    correct: int
    unjudged: int
    """Answers of which the grader cannot tell whether they are correct."""
    grader_errors: int
    """Answers at which the grader failed: it crashed, or took too long."""
    total: int
    """Answers."""
    ci_low: float
    """Of the 95 % interval of the accuracy, as the next: Wilson's for one answer to each problem,
    for several by drawing problems anew."""
    ci_high: float
    response_length: float
    """Mean tokens of an answer."""
    truncated_share: float
    """Answers that were cut off at the longest length."""
    further: dict[str, float]
    """pass@j and majority@k of several samples."""
    intervals: dict[str, tuple[float, float]]
    """Theirs, 95 %."""
    responses: tuple[GradedResponse, ...] = field(repr=False)
    """[total] in the order of the problems."""

    def record(self) -> dict[str, Any]:
        """Return the numbers as one flat record, without the responses."""
        apart = ("responses", "further", "intervals")
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        record |= self.further
        return record | ({"intervals": self.intervals} if self.intervals else {})


def item_digest(problem: Prompt) -> str:
    """Hash the fields of a problem, whatever a chat template makes of them.

    All of them: an environment or a grader may look at any.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(problem.fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def set_digest(problems: Sequence[Prompt]) -> str:
    """Hash the problems of a set in their order; 16 hexadecimal digits."""
    return hashlib.sha256("".join(map(item_digest, problems)).encode()).hexdigest()[:16]


def grade_samples(
    problems: Sequence[Prompt],
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerBase",
    grader: Grader,
    numbers: Sequence[int] | None = None,
) -> list[GradedResponse]:
    """Grade a sample of each problem.

    Args:
        problems: of the samples: one that has several is there several times.
        numbers: of the samples among those of their problems; None: 0.
    """
    texts = [tokenizer.decode(list(s.token_ids), skip_special_tokens=True) for s in samples]
    grades = grader.grade_all([(t, p.fields) for t, p in zip(texts, problems, strict=True)])
    numbers = [0] * len(samples) if numbers is None else numbers
    return [
        GradedResponse(
            prompt_index=problem.index,
            prompt=problem.text,
            response=text,
            answer=str(problem.fields.get("answer")),
            correct=grade.correct,
            finish_reason=sample.finish_reason,
            error=grade.error,
            given=grader.given(text),
            sample=number,
            tokens=len(sample.token_ids),
            item=item_digest(problem),
        )
        for problem, sample, text, grade, number in zip(
            problems, samples, texts, grades, numbers, strict=True
        )
    ]


def grade_answers(
    problems: Sequence[Prompt],
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerBase",
    grader: Grader | None = None,
) -> EvaluationResult:
    """Grade what was sampled for each problem, as many samples of each.

    Args:
        samples: in the order of :meth:`Asking.requests`.
        grader: None: the one of the default settings.

    Raises:
        InputError: the grader failed at every answer.
    """
    count = len(samples) // max(1, len(problems))
    numbers = [number for _ in problems for number in range(count)]
    asked = [problem for problem in problems for _ in range(count)]
    grader = grader or grader_of(GraderConfig())
    return result_of(grade_samples(asked, samples, tokenizer, grader, numbers), count)


def result_of(responses: Sequence[GradedResponse], samples: int) -> EvaluationResult:
    """Compute the numbers of graded answers.

    Args:
        samples: asked of each problem.

    Raises:
        InputError: there is no answer, or the grader failed at every one.
    """
    if not responses:
        raise InputError("There is no answer to grade: the list of problems is empty.")
    errors = num_errors(responses)
    verdicts = [response.correct for response in responses]
    found = measures(responses, samples)
    intervals = {name: interval(values) for name, values in found.items()} if samples > 1 else {}
    correct, counted = verdicts.count(True), len(verdicts) - errors
    means = {name: float(np.mean(values)) for name, values in found.items()}
    low, high = wilson_interval(correct, counted)
    if intervals:
        low, high = intervals.pop("accuracy")
    total = len(responses)
    return EvaluationResult(
        accuracy=means["accuracy"],
        correct=correct,
        unjudged=verdicts.count(None) - errors,
        grader_errors=errors,
        total=total,
        ci_low=low,
        ci_high=high,
        response_length=sum(r.tokens for r in responses) / total,
        truncated_share=sum(r.finish_reason == "length" for r in responses) / total,
        further={name: value for name, value in means.items() if name != "accuracy"},
        intervals=intervals,
        responses=tuple(responses),
    )


def num_errors(grades: Sequence[Grade] | Sequence[GradedResponse]) -> int:
    """Count the answers at which a grader failed, and say on stderr why the first did.

    Raises:
        InputError: all of them.
    """
    errors = [grade.error for grade in grades if grade.error]
    if not errors:
        return 0
    said = f"the grader gave no verdict on {len(errors)} of {len(grades)} answers"
    if len(errors) == len(grades):
        raise InputError(f"{said}: {errors[0]}. Correct [grader].")
    print(f"tropd: warning: {said}, which count by themselves: {errors[0]}", file=sys.stderr)
    return len(errors)
