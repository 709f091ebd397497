"""Teacher responses written beforehand by `tropd responses`: format, reading, checks.

The first line is a header, every other line one response::

    {"format": "tropd-responses-1", "tokenizer": "<fingerprint>", "settings": {...}}
    {"prompt_index": 0, "prompt_sha": "...", "sample": 0, "token_ids": [...], "text": "...",
     "finish_reason": "stop", "seed": 1}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import read_json_lines
from megatron_tropd.data.prompts import find_prompt, indices_of
from megatron_tropd.data.tokenizers import fingerprint, num_ids
from megatron_tropd.data.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "tropd-responses-1"


@dataclass(frozen=True)
class TeacherResponse:
    """One response of the teacher to one prompt."""

    prompt_index: int
    """``Prompt.index``."""
    sample: int
    """0-based among the responses to the prompt."""
    token_ids: tuple[int, ...]
    """[R] ids; ends with the stop token when ``finish_reason`` is "stop"."""
    finish_reason: str
    """"stop" (ended by itself) or "length" (cut off)."""


def prompt_fingerprint(prompt: Prompt) -> str:
    """Hash of the prompt's token ids: 16 hexadecimal digits, written beside each response."""
    return hashlib.sha256(json.dumps(prompt.token_ids).encode()).hexdigest()[:16]


def header_record(
    tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]
) -> dict[str, Any]:
    """First line of a responses file.

    Args:
        settings: what else must be equal when the tool continues the file.
    """
    return {"format": FORMAT, "tokenizer": fingerprint(tokenizer), "settings": dict(settings)}


def response_record(
    prompt: Prompt, response: TeacherResponse, *, text: str, seed: int
) -> dict[str, Any]:
    """One line of a responses file."""
    return {
        "prompt_index": response.prompt_index,
        "prompt_sha": prompt_fingerprint(prompt),
        "sample": response.sample,
        "token_ids": list(response.token_ids),
        "text": text,
        "finish_reason": response.finish_reason,
        "seed": seed,
    }


def load_responses(
    path: str | Path,
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    filtered: bool = False,
) -> dict[int, tuple[TeacherResponse, ...]]:
    """Read a responses file and check it against the prompts and the tokenizer of the run.

    Args:
        prompts: the run's prompts; each must have at least one response.
        filtered: prompts of the file may have been left out, with them their responses are.

    Returns:
        Responses by ``Prompt.index``, in the order of their sample numbers.

    Raises:
        InputError: the file is missing, empty, not of this format, broken (with the line number),
            made with another tokenizer or other prompts, or without a response to a prompt.
    """
    lines = read_json_lines(path, "responses file")
    _, header = next(lines, (0, None))
    _check_header(header, path, fingerprint(tokenizer))
    found: dict[int, dict[int, TeacherResponse]] = {}
    for number, record in lines:
        where = f"{path}, line {number}"
        index = record.get("prompt_index")
        prompt = find_prompt(prompts, index) if type(index) is int else None
        if prompt is None and filtered and type(index) is int:
            continue
        response = _response(record, prompt, len(prompts), num_ids(tokenizer), where, header)
        found.setdefault(response.prompt_index, {})[response.sample] = response
    missing = [index for index in indices_of(prompts) if index not in found]
    if missing:
        raise InputError(
            f"{path} has no response to {len(missing)} of the {len(prompts)} prompts, the first "
            f"of them prompt {missing[0]}. Run `tropd responses` again: it continues "
            "the file."
        )
    return {i: tuple(by_sample[s] for s in sorted(by_sample)) for i, by_sample in found.items()}


def _check_header(header: dict[str, Any] | None, path: str | Path, expected: str) -> None:
    if header is None:
        raise InputError(f"The responses file {path} is empty. Run `tropd responses`.")
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path}, line 1: expected a header with format {FORMAT!r}, found "
            f"{header.get('format')!r}. Write the file with `tropd responses`."
        )
    if header.get("tokenizer") != expected:
        raise InputError(
            f"{path} was written with another tokenizer: expected fingerprint {expected}, found "
            f"{header.get('tokenizer')}. Write it again with the teacher of this run."
        )


def _template_of(header: Mapping[str, Any] | None) -> str:
    """What a run must set to have the prompts that the responses were written for."""
    settings = (header or {}).get("settings") or {}
    names = [name for name in ("chat_template_kwargs", "chat_template_date") if name in settings]
    told = ", ".join(f"rollout.{name} = {settings[name]!r}" for name in names)
    return f", or set what they were written with: {told}" if told else ""


def _response(
    record: dict[str, Any],
    prompt: Prompt | None,
    num_prompts: int,
    vocab_size: int,
    where: str,
    header: Mapping[str, Any] | None,
) -> TeacherResponse:
    index, sample = record.get("prompt_index"), record.get("sample")
    ids, reason = record.get("token_ids"), record.get("finish_reason")
    if type(index) is not int or prompt is None:
        raise InputError(
            f"{where}: prompt_index must be in 0..{num_prompts - 1}, found {index!r}. The file "
            "belongs to other prompts; write it again."
        )
    if record.get("prompt_sha") != prompt_fingerprint(prompt):
        raise InputError(
            f"{where}: prompt {index} is not the one this response was written for. The prompts "
            f"or their template changed; write the responses again{_template_of(header)}."
        )
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise InputError(f"{where}: token_ids must be a list of ids, not empty, found {ids!r}.")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InputError(
            f"{where}: token_ids must be in 0..{vocab_size - 1}, found {min(ids)}..{max(ids)}."
        )
    if not isinstance(sample, int) or reason not in ("stop", "length"):
        raise InputError(
            f'{where}: expected an integer "sample" and finish_reason "stop" or "length", found '
            f"{sample!r} and {reason!r}."
        )
    return TeacherResponse(index, sample, tuple(ids), reason)
