"""Golden answers: reference solutions that stand in the prompts' file beside their prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GoldenAnswers = Mapping[int, tuple[int, ...]]
"""``Prompt.index`` -> ids of its answer, an EOS at the end."""


def golden_answers(
    path: str | Path,
    prompts: Sequence[Prompt],
    field: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
) -> GoldenAnswers:
    """Tokenize the golden answer of every prompt.

    Args:
        path: of the prompts' file, for messages.
        field: ``guidance.golden_field``.
        tokenizer: the student's; ends an answer with its EOS.

    Raises:
        InputError: a prompt has none, or one that is too long; with the line number.
    """
    return {
        p.index: _answer(p, field, tokenizer, max_new_tokens, f"{path}, {p.place}") for p in prompts
    }


def golden_sequence(key: SampleKey, prompt: Prompt, answer: Sequence[int]) -> TokenSequence:
    """Make a prompt and its golden answer the sequence that stands in a sample's place."""
    runs = (Writer.CONTEXT, prompt.token_ids), (Writer.GOLDEN, answer)
    return TokenSequence.of_runs(key, *runs)


def _answer(
    prompt: Prompt, field: str, tokenizer: "PreTrainedTokenizerBase", most: int, where: str
) -> tuple[int, ...]:
    text = prompt.fields.get(field)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f'{where}: guidance.golden_field expects the golden answer under "{field}", a text, '
            f"found {text!r:.60}. Write it there, or remove the line."
        )
    # Not verbose: transformers would warn of the first long text and of no other.
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "A golden answer ends with the tokenizer's EOS, and the student's has none. Name an "
            "eos_token in its tokenizer_config.json."
        )
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    if len(ids) > most:
        raise InputError(
            f"{where}: the golden answer has {len(ids)} tokens, its EOS included, and "
            f"rollout.max_new_tokens = {most}. Raise that, or remove the line."
        )
    return tuple(ids)
