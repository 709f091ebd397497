"""What the options of commands that read a prompts file say."""

import argparse
import datetime
import json
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import DataConfig, PromptConfig, settings_from_table
from megatron_tropd.data.prompts import Prompts, check_kwargs_are_read, is_templated, load_prompts
from megatron_tropd.data.resumable import recorded_settings
from megatron_tropd.data.templates import reads_clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def data_of(text: str | None) -> DataConfig:
    """Read the option ``--data``.

    Raises:
        ConfigError: it is no such table.
    """
    table = _table(text or "{}", "--data", '{"split": "test"}')
    found: DataConfig = settings_from_table(DataConfig, table)
    return found


def read_prompts(
    options: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", context: int
) -> tuple[Prompts, dict[str, Any]]:
    """Read the prompts that the options name.

    Args:
        options: with those of ``config.run_defaults.add_prompt_options``, ``out`` and
            ``max_new_tokens``.

    Returns:
        The prompts, and what the header of ``out`` must say of their template.

    Raises:
        InputError: the prompts are unusable.
        ConfigError: an option is out of its range.
    """
    if not 0 < options.max_new_tokens < context:
        raise ConfigError(
            f"--max-new-tokens must be in 1..{context - 1} for the model's context of {context} "
            f"tokens, found {options.max_new_tokens}."
        )
    # The same command continues a file, also on another day.
    before = recorded_settings(options.out).get("chat_template_date")
    date = options.chat_template_date or before
    settings = PromptConfig(
        apply_chat_template=options.apply_chat_template,
        chat_template_kwargs=_table(
            options.chat_template_kwargs, "--chat-template-kwargs", '{"enable_thinking": false}'
        ),
        system_prompt=options.system_prompt,
        prompt_template=options.prompt_template,
        chat_template_date=date or datetime.date.today().isoformat(),
    )
    prompts = load_prompts(
        options.prompts,
        tokenizer,
        settings,
        data=data_of(options.data),
        max_prompt_tokens=context - options.max_new_tokens,
        filter_overlong=options.filter_overlong_prompts,
    )
    check_kwargs_are_read(prompts, settings)
    if not any(is_templated(prompt.fields, settings) for prompt in prompts):
        return prompts, {}
    recorded: dict[str, Any] = {}
    if settings.chat_template_kwargs:
        recorded["chat_template_kwargs"] = settings.chat_template_kwargs
    if reads_clock(tokenizer):
        recorded["chat_template_date"] = settings.chat_template_date
    return prompts, recorded


def _table(text: str, option: str, example: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise ConfigError(f"{option} must be a JSON object such as '{example}', found {text!r}.")
    return table
