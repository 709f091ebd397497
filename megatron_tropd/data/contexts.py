"""What a teacher reads in the place of the student's prompt: the prompt's line, told otherwise.

``teacher.context`` is a text with the fields of the line in braces. It becomes a prompt in the way
the line did: a text by itself, or the last message of the user in the chat template.
"""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import PromptConfig
from megatron_tropd.data.prompts import leading_ids, tokenize_line
from megatron_tropd.data.templates import conversation
from megatron_tropd.data.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "prompt"
"""In braces: the line's own prompt, or the last message of the user."""


def contexts_of(
    path: str | Path,
    prompts: Sequence[Prompt],
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    settings: PromptConfig,
    *,
    max_tokens: int,
) -> dict[int, tuple[int, ...]]:
    """Make the token ids that a teacher reads in the place of each prompt.

    Args:
        path: of the prompts, for messages.
        template: ``teacher.context``.
        settings: how lines become token ids.
        max_tokens: most that leave room for a response.

    Returns:
        ``Prompt.index`` -> ids.

    Raises:
        ConfigError: the template is none.
        InputError: a line lacks a field, or its context is too long; with the line number.
    """
    names, leading = field_names(template), leading_ids(tokenizer)
    found = {}
    for prompt in prompts:
        where = f"{path}, line {prompt.line}"
        fields = _with_context(prompt.fields, template, names, where)
        _, ids = tokenize_line(fields, tokenizer, settings, f"{where}, teacher.context", leading)
        if len(ids) > max_tokens:
            raise InputError(
                f"{where}: teacher.context makes {len(ids)} tokens, at most {max_tokens} fit "
                "(context of the models minus the longest response). Shorten the fields that it "
                "names, or allow fewer new tokens."
            )
        found[prompt.index] = ids
    return found


def field_names(template: str) -> list[str]:
    """Find the fields that ``teacher.context`` names.

    Raises:
        ConfigError: braces hold something else than a name, or there is no field at all.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"teacher.context: {error}. Write a brace that is meant twice.") from None
    names = []
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ConfigError(
                f"teacher.context: braces hold the name of a field of a prompt's line, found "
                f"{{{name}}}. Write a brace that is meant twice."
            )
        names.append(name)
    if not names:
        raise ConfigError(
            'teacher.context must name a field of the prompts\' lines, such as "{prompt}", found '
            f"{template!r:.60}."
        )
    return names


def _with_context(
    fields: dict[str, Any], template: str, names: Sequence[str], where: str
) -> dict[str, Any]:
    """The line with the context in the place of its prompt, or of its last message of the user."""
    given = fields.get("messages", fields.get(PROMPT))
    messages = conversation(given, where) if isinstance(given, list) else None
    own, place = given, -1
    if messages is not None:
        users = [n for n, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise InputError(
                f"{where}: teacher.context takes the place of the user's last message, found none."
            )
        place = users[-1]
        own = messages[place]["content"]
    values = {**fields, PROMPT: own}
    if missing := [name for name in names if not isinstance(values.get(name), str | int | float)]:
        raise InputError(
            f"{where}: teacher.context reads {', '.join(missing)}, a text or a number; the line "
            f"has {', '.join(fields)}. Add it, or change teacher.context."
        )
    text = template.format(**{name: values[name] for name in names})
    if messages is None:
        return {**fields, PROMPT: text}
    messages[place] = {**messages[place], "content": text}
    rest = {key: value for key, value in fields.items() if key not in ("messages", PROMPT)}
    return {**rest, "messages": messages}
