"""Some sequences of a step, token by token with their values, for the report."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_tropd.data.prompts import find_prompt
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.distill.step_records import Examples
from megatron_tropd.tasks.grading import Grader

_LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens


def example_rows(num_samples: int, samples_per_prompt: int, wanted: int) -> list[int]:
    """One sequence of each of the first prompts, another sample number for each in turn."""
    prompts = min(wanted, num_samples // samples_per_prompt)
    return [i * samples_per_prompt + i % samples_per_prompt for i in range(prompts)]


def gather_examples(mine: Examples) -> Examples:
    """Union of every rank's examples on rank 0, nothing elsewhere. Collectives: one gather."""
    parts: list[Any] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts, dst=0)
    union: Examples = {}
    for part in parts or ():
        for row, values in part.items():
            of_row = union.setdefault(row, {})
            for name, of_tokens in values.items():
                of_row.setdefault(name, {}).update(of_tokens)
    return union


def example_line(
    inputs: Inputs,
    sequence: TokenSequence,
    values: Mapping[str, Mapping[int, float]],
    graders: Sequence[Grader],
) -> str:
    """One sequence with its per-token values, null where a token has none, as a line of a dump.

    Args:
        graders: of each task, by number.
    """
    tokenizer, ids = inputs.tokenizer, sequence.response_ids
    # Their positions are no indices: prompts may have been left out.
    prompt = find_prompt(inputs.prompts, sequence.key.prompt)
    assert prompt is not None, "a sequence is of a prompt of the run"
    text = tokenizer.decode(sequence.answer_ids, skip_special_tokens=True)
    graded = "answer" in prompt.fields and prompt.fields["answer"] is not None
    record = {
        "step": sequence.key.step,
        "prompt": prompt.text,
        "tokens": spell(tokenizer, ids),
        "segment": [writer.name.lower() for writer in sequence.writers],
        "correct": graders[prompt.task].grade(text, prompt.fields).correct if graded else None,
        **({"task": inputs.tasks.names[prompt.task]} if inputs.tasks else {}),
        **{name: [of.get(i) for i in range(len(ids))] for name, of in values.items()},
    }
    return json.dumps(record) + "\n"


def spell(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds, so that joined they are the text (spaces included).

    A token is decoded beside the one before it, since its leading space may depend on that. The
    token that completes a character has it; those with its first bytes add nothing. Bytes that
    are no text are spelled by U+FFFD, as many as a decoder makes of them here.
    """
    ids = list(token_ids)
    pieces: list[str] = []
    start = read = 0
    before = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if text.endswith("\ufffd") and end - read < _LONGEST_CHARACTER and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, read = read, end
        before = tokenizer.decode(ids[start:read], skip_special_tokens=False)
    return pieces
