"""Exact-match accuracy: greedy answers to held-out problems, graded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.graders import grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRADER = "marked"
"""What ``graders.grade`` is called in the records of evaluations."""
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


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy on a set of problems."""

    accuracy: float
    """correct / total, 0..1: what cannot be judged is not correct."""
    correct: int
    unjudged: int
    """Answers of which the grader cannot tell whether they are correct."""
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
        stop_token_ids: ids that end an answer, EOS included.

    Raises:
        InputError: there is no problem, or one has no answer.
    """
    if not problems:
        raise InputError("There is no problem to evaluate: the list is empty.")
    for problem in problems:
        reference_answer(problem)  # before the work, not after it
    requests = [SampleRequest(problem.token_ids, max_new_tokens, 0) for problem in problems]
    return engine.generate(requests, Sampling(temperature=0.0, stop_token_ids=stop_token_ids))


def grade_answers(
    problems: Sequence[Prompt],
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerBase",
) -> EvaluationResult:
    """Grade what was sampled for each problem."""
    responses = []
    for problem, sample in zip(problems, samples, strict=True):
        answer = reference_answer(problem)
        text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        responses.append(
            GradedResponse(
                prompt_index=problem.index,
                prompt=problem.text,
                response=text,
                answer=answer,
                correct=grade(text, answer),
                finish_reason=sample.finish_reason,
            )
        )
    verdicts = [response.correct for response in responses]
    correct, total = verdicts.count(True), len(verdicts)
    low, high = wilson_interval(correct, total)
    return EvaluationResult(
        accuracy=correct / total,
        correct=correct,
        unjudged=verdicts.count(None),
        total=total,
        ci_low=low,
        ci_high=high,
        responses=tuple(responses),
    )


def reference_answer(problem: Prompt) -> str:
    """The "answer" of a problem, a string or a number, as text.

    Raises:
        InputError: there is none.
    """
    answer = problem.fields.get("answer")
    good = isinstance(answer, str | int) and not isinstance(answer, bool)
    if isinstance(answer, float):
        good = math.isfinite(answer)
    if not good or not str(answer).strip():
        found = repr(answer) if "answer" in problem.fields else "none"
        raise InputError(
            f'Problem {problem.index} ({problem.place}) needs an "answer", a string or a '
            f'number, found {found}. Add it, or use evaluation.task = "reverse_kl".'
        )
    return str(answer)


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
