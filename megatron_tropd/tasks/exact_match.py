"""Exact-match accuracy: greedy answers to held-out problems, graded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_tropd.data.types import Prompt
from megatron_tropd.errors import InputError
from megatron_tropd.rollout.types import Sample, SampleRequest, Sampling
from megatron_tropd.tasks.graders import grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Engine(Protocol):
    """Anything that continues requests; the rollout room's engines do."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """One sample per request, in order."""
        ...


@dataclass(frozen=True)
class GradedResponse:
    """One problem and what the model made of it."""

    prompt_index: int
    """``Prompt.index`` of the problem."""
    prompt: str
    """The problem as the model saw it."""
    response: str
    """What the model wrote, special tokens left out."""
    answer: str
    """The reference."""
    correct: bool
    """The grader's verdict."""
    finish_reason: str
    """"stop" or "length"."""


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy on a set of problems."""

    accuracy: float
    """correct / total, 0..1."""
    correct: int
    """Problems solved."""
    total: int
    """Problems asked."""
    ci_low: float
    """Lower end of the 95 % Wilson interval of the accuracy."""
    ci_high: float
    """Upper end."""
    responses: tuple[GradedResponse, ...]
    """[total] in the order of the problems."""


def evaluate_exact_match(
    engine: Engine,
    problems: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_token_ids: tuple[int, ...],
    max_new_tokens: int,
    grader: str = "marked",
) -> EvaluationResult:
    """Answer every problem greedily and grade the answers.

    Args:
        engine: continues the prompts.
        problems: prompts whose ``fields`` hold "answer".
        tokenizer: turns ids into text.
        stop_token_ids: ids that end an answer, EOS included.
        max_new_tokens: longest answer.
        grader: a key of :data:`megatron_tropd.tasks.graders.GRADERS`.

    Returns:
        Accuracy, its interval and every graded response.

    Raises:
        InputError: there is no problem, or one has no answer.
    """
    answers = [reference_answer(problem) for problem in problems]
    if not problems:
        raise InputError("There is no problem to evaluate: the list is empty.")
    requests = [SampleRequest(problem.token_ids, max_new_tokens, 0) for problem in problems]
    greedy = Sampling(temperature=0.0, stop_token_ids=stop_token_ids)
    responses = []
    samples = engine.generate(requests, greedy)
    for problem, answer, sample in zip(problems, answers, samples, strict=True):
        text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        responses.append(
            GradedResponse(
                prompt_index=problem.index,
                prompt=problem.text,
                response=text,
                answer=answer,
                correct=grade(text, answer, grader=grader),
                finish_reason=sample.finish_reason,
            )
        )
    correct = sum(response.correct for response in responses)
    low, high = wilson_interval(correct, len(responses))
    return EvaluationResult(
        correct / len(responses), correct, len(responses), low, high, tuple(responses)
    )


def reference_answer(problem: Prompt) -> str:
    """The reference answer of a problem as text.

    Args:
        problem: a prompt whose ``fields`` hold "answer", a string or a number.

    Returns:
        The answer.

    Raises:
        InputError: there is none.
    """
    answer = problem.fields.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(
            f'Problem {problem.index} (line {problem.line}) needs an "answer", a string or a '
            f"number, found {answer!r}."
        )
    return str(answer)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    r"""95 % confidence interval of a share.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        correct: successes.
        total: trials, at least 1.

    Returns:
        (low, high) in 0..1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share, z2 = correct / total, _Z_95**2
    centre = share + z2 / (2 * total)
    spread = _Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    # Rounding must not leave the share itself outside.
    return max(0.0, min(share, (centre - spread) / scale)), min(
        1.0, max(share, (centre + spread) / scale)
    )
