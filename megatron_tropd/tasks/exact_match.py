"""Exact-match accuracy: greedy answers to held-out problems, graded."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import GraderConfig
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.grading import Grade, Grader, grader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Sampler(Protocol):
    """Anything that continues requests; the rollout room's engines do."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """One sample per request, in order."""
        ...


@dataclass(frozen=True)
class GradedResponse:
    """One problem and what the model made of it."""

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


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy on a set of problems."""

    accuracy: float
    """correct / (total - grader_errors), 0..1: what cannot be judged is not correct."""
    correct: int
    unjudged: int
    """Answers of which the grader cannot tell whether they are correct."""
    grader_errors: int
    """Answers at which the grader failed: it crashed, or took too long."""
    total: int
    ci_low: float
    """Of the 95 % Wilson interval of the accuracy, as the next."""
    ci_high: float
    responses: tuple[GradedResponse, ...]
    """[total] in the order of the problems."""


def answer_greedily(
    engine: Sampler,
    problems: Sequence[Prompt],
    *,
    stop_token_ids: tuple[int, ...],
    max_new_tokens: int,
) -> list[Sample]:
    """One greedy sample for each problem.

    Args:
        problems: checked by :func:`check_problems`.
        stop_token_ids: ids that end an answer, EOS included.

    Raises:
        InputError: there is no problem.
    """
    if not problems:
        raise InputError("There is no problem to evaluate: the list is empty.")
    requests = [SampleRequest(problem.token_ids, max_new_tokens, 0) for problem in problems]
    return engine.generate(requests, Sampling(temperature=0.0, stop_token_ids=stop_token_ids))


def grade_answers(
    problems: Sequence[Prompt],
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerBase",
    grader: Grader | None = None,
) -> EvaluationResult:
    """Grade what was sampled for each problem.

    Args:
        grader: None: the one of the default settings.

    Raises:
        InputError: the grader failed at every answer.
    """
    grader = grader or grader_of(GraderConfig())
    texts = [tokenizer.decode(list(s.token_ids), skip_special_tokens=True) for s in samples]
    fields = [problem.fields for problem in problems]
    grades = grader.grade_all(list(zip(texts, fields, strict=True)))
    responses = [
        GradedResponse(
            prompt_index=problem.index,
            prompt=problem.text,
            response=text,
            answer=str(problem.fields.get("answer")),
            correct=given.correct,
            finish_reason=sample.finish_reason,
            error=given.error,
        )
        for problem, sample, text, given in zip(problems, samples, texts, grades, strict=True)
    ]
    errors = num_errors(grades)
    verdicts = [response.correct for response in responses]
    correct, total = verdicts.count(True), len(verdicts)
    low, high = wilson_interval(correct, total - errors)
    return EvaluationResult(
        accuracy=correct / (total - errors),
        correct=correct,
        unjudged=verdicts.count(None) - errors,
        grader_errors=errors,
        total=total,
        ci_low=low,
        ci_high=high,
        responses=tuple(responses),
    )


def num_errors(grades: Sequence[Grade]) -> int:
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


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    r"""95 % confidence interval of a share.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        total: trials, at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, z2 = correct / total, _Z_95**2
    centre = share + z2 / (2 * total)
    spread = _Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not leave the share itself outside.
    return max(0.0, min(share, low)), min(1.0, max(share, high))
