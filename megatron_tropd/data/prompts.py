"""The prompts file, and which prompts belong to a step."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from megatron_tropd.data.types import Prompt
from megatron_tropd.errors import ConfigError, InputError
from megatron_tropd.losses.draws import Purpose, keyed_seed, keyed_uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON-lines file with their line numbers; blank lines are skipped.

    Args:
        path: the file.
        what: what it is, for errors ("prompts file").

    Yields:
        (1-based line number, object).

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_json_line(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(
            f"The {what} {path} cannot be read: {error.strerror}. Check the path."
        ) from None


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """The object in one line of a JSON-lines file.

    Args:
        line: UTF-8.
        where: file and line number, for errors.

    Returns:
        The object.

    Raises:
        InputError: the line is not a JSON object.
    """
    try:
        value = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise InputError(f"{where}: expected a JSON object, found {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def load_prompts(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    apply_chat_template: bool = False,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Read and tokenize a prompts file, all of it or an error.

    Args:
        path: JSON lines: {"prompt": str} or {"messages": [{"role", "content"}, ...]}; other keys
            are kept in ``Prompt.fields``.
        tokenizer: the student's.
        apply_chat_template: wrap "prompt" as a user message; "messages" always are wrapped.
        max_prompt_tokens: most tokens a prompt may have (context minus the response).

    Returns:
        Prompts in the order of the file, ``index`` counting from 0.

    Raises:
        InputError: the file is missing or empty, a line is broken, or a prompt is empty or too
            long; with the line number.
    """
    prompts: list[Prompt] = []
    for number, fields in read_json_lines(path, "prompts file"):
        where = f"{path}, line {number}"
        text = _prompt_text(fields, tokenizer, apply_chat_template, where)
        templated = apply_chat_template or "messages" in fields
        # A chat template writes BOS itself.
        ids = _encode(text, tokenizer, not templated, where)
        if not ids:
            raise InputError(f"{where}: the prompt has no tokens. Remove the line.")
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise InputError(
                f"{where}: the prompt has {len(ids)} tokens, at most {max_prompt_tokens} fit "
                "(context of the models minus rollout.max_new_tokens). Shorten the prompt or "
                "lower rollout.max_new_tokens."
            )
        prompts.append(Prompt(index=len(prompts), text=text, token_ids=ids, fields=fields))
    if not prompts:
        raise InputError(f"The prompts file {path} is empty: expected one JSON object per line.")
    return prompts


def prompts_of_step(n_prompts: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the prompts of one step: a keyed permutation per epoch, no state to save.

    The last ``n_prompts % per_step`` prompts of each permutation sit that epoch out, so no step
    sees a prompt twice.

    Args:
        n_prompts: prompts in the file.
        per_step: prompts of a step (``rollout.prompts_per_step``).
        step: 0-based training step.
        seed: ``train.seed``.

    Returns:
        ``per_step`` different indices.

    Raises:
        ConfigError: the file has fewer prompts than a step needs.
    """
    if per_step > n_prompts:
        raise ConfigError(
            f"rollout.prompts_per_step = {per_step} exceeds the {n_prompts} prompts of the file. "
            "Lower it or add prompts."
        )
    epoch, place = divmod(step, n_prompts // per_step)
    return list(_permutation(n_prompts, epoch, seed)[place * per_step : (place + 1) * per_step])


@lru_cache(maxsize=2)
def _permutation(n_prompts: int, epoch: int, seed: int) -> tuple[int, ...]:
    key = keyed_seed(seed, Purpose.PROMPT_ORDER)
    draws = keyed_uniform(key, epoch, 0, np.arange(n_prompts))
    return tuple(np.argsort(draws, kind="stable").tolist())


def _prompt_text(
    fields: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", wrap: bool, where: str
) -> str:
    messages = fields.get("messages")
    if messages is None:
        text = fields.get("prompt")
        if not isinstance(text, str):
            raise InputError(
                f'{where}: expected "prompt" (a string) or "messages" (a list), found keys '
                f"{sorted(fields)}."
            )
        if not text.strip():
            raise InputError(f"{where}: the prompt is empty. Remove the line.")
        if not wrap:
            return text
        messages = [{"role": "user", "content": text}]
    return _render(messages, tokenizer, where)


def _render(messages: Any, tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    if not good or not messages:
        raise InputError(
            f'{where}: "messages" must be a list of {{"role", "content"}} objects, not empty.'
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: needs a chat template, but the student's tokenizer has none. Give plain "
            '"prompt" strings with rollout.apply_chat_template = false, or add the template.'
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(
            f"{where}: the chat template refuses these messages ({error}). Change the messages "
            "to what the template takes."
        ) from None
    return str(text)


def _encode(
    text: str, tokenizer: "PreTrainedTokenizerBase", special: bool, where: str
) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the prompt holds half a surrogate pair at character {error.start}, which "
            "is no text. Remove it."
        ) from None
    return tuple(tokenizer.encode(text, add_special_tokens=special))
