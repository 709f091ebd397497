"""The recorded rollouts that a run trains on: read, compared with its prompts, graded."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config
from megatron_tropd.data.prompts import find_prompt
from megatron_tropd.data.recorded import read_recorded
from megatron_tropd.data.sequence import SampleKey, TokenSequence
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.exact_match import num_errors
from megatron_tropd.tasks.grading import Grade, Grader, grader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVANTAGE = "advantage"
"""Field of a graded sequence: its outcome less the mean outcome of the prompt's samples."""
OUTCOME = "outcome"
"""Field of a graded sequence: 1 if its answer is right, else 0."""


def load_recorded(
    config: Config, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> list[list[TokenSequence]] | None:
    """Read the rollouts that a run trains on.

    Args:
        vocab_size: columns that are real in all models.

    Returns:
        The samples of each recorded prompt and round, graded if the loss reads outcomes; None: the
        run samples.

    Raises:
        InputError: the file is unusable, or not of these prompts.
        ConfigError: it does not fit the rollout settings.
    """
    rollout = config.rollout
    if rollout.recorded is None:
        return None
    sequences = read_recorded(rollout.recorded, vocab_size=vocab_size, tokenizer=tokenizer)
    for sequence in sequences:
        _check(sequence, find_prompt(prompts, sequence.key.prompt), config)

    def which(sequence: TokenSequence) -> SampleKey:
        return sequence.key._replace(sample=0)

    groups = [list(group) for _, group in groupby(sorted(sequences, key=_key), which)]
    sizes = sorted({len(group) for group in groups})
    if sizes != [rollout.samples_per_prompt]:
        raise ConfigError(
            f"rollout.samples_per_prompt = {rollout.samples_per_prompt} must be that of the "
            f"recorded rollouts, of which {rollout.recorded} has {' or '.join(map(str, sizes))} a "
            "prompt. Set it to that, or record again (a file that was cut short goes on with the "
            "same command)."
        )
    if len(groups) < rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step = {rollout.prompts_per_step} exceeds the {len(groups)} "
            f"prompts of {rollout.recorded}. Lower it or record more."
        )
    if config.loss.needs.outcomes:
        return _all_graded(groups, prompts, tokenizer, grader_of(config.grader))
    return groups


def _key(sequence: TokenSequence) -> SampleKey:
    return sequence.key


def _check(sequence: TokenSequence, prompt: Prompt | None, config: Config) -> None:
    rollout = config.rollout
    where = f"{rollout.recorded}, prompt {sequence.key.prompt}, sample {sequence.key.sample}"
    if prompt is None or sequence.prompt_ids != list(prompt.token_ids):
        raise InputError(
            f"{where}: expected the ids that rollout.prompts has for this prompt, found others. "
            f"Record with {rollout.prompts} and the same chat template."
        )
    if len(sequence.response_ids) > rollout.max_new_tokens:
        raise ConfigError(
            f"{where}: the response has {len(sequence.response_ids)} tokens, and "
            f"rollout.max_new_tokens is {rollout.max_new_tokens}. Raise it to that."
        )


def _all_graded(
    groups: list[list[TokenSequence]],
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    grader: Grader,
) -> list[list[TokenSequence]]:
    """The samples of every prompt with how much better each is than their mean."""
    pairs = []
    for group in groups:
        prompt = find_prompt(prompts, group[0].key.prompt)
        assert prompt is not None, "its sequences were compared with it"
        grader.check(prompt.fields, f"Prompt {prompt.index} ({prompt.place})")
        texts = [tokenizer.decode(s.answer_ids, skip_special_tokens=True) for s in group]
        pairs += [(text, prompt.fields) for text in texts]
    grades = grader.grade_all(pairs)
    num_errors(grades)
    left = iter(grades)
    return [_graded(group, [next(left) for _ in group]) for group in groups]


def _graded(group: list[TokenSequence], grades: list[Grade]) -> list[TokenSequence]:
    """One without a verdict counts as the mean, so that it is neither better nor worse."""
    judged = [float(given.correct is True) for given in grades if not given.error]
    mean = sum(judged) / len(judged) if judged else 0.0
    outcomes = [mean if given.error else float(given.correct is True) for given in grades]
    return [
        sequence.replace(fields={**sequence.fields, OUTCOME: outcome, ADVANTAGE: outcome - mean})
        for sequence, outcome in zip(group, outcomes, strict=True)
    ]
