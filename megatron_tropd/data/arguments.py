"""Options of the tools that read a prompts file, the same for all of them."""

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


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how lines of ``--prompts`` become token ids."""
    add = parser.add_argument
    add("--prompts", required=True, help="file or data set, as rollout.prompts (docs/prompts.md)")
    add_data_option(parser)
    add("--apply-chat-template", action="store_true", help="wrap prompts in the chat template")
    add("--chat-template-kwargs", default="{}", help="what it reads beside messages, as JSON")
    add("--chat-template-date", help="YYYY-MM-DD, for one that reads the clock (default: --out's)")
    add("--filter-overlong-prompts", action="store_true", help="leave out prompts that do not fit")
    add("--system-prompt", default="", help="first message of a conversation that has none")
    add("--prompt-template", default="", help='Jinja text, such as "{{ prompt }} Be brief."')


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what of a file or data set is read."""
    shown = '\'{"split": "test", "fields": {"prompt": "question"}}\''
    parser.add_argument("--data", metavar="JSON", help=f"as [rollout.data]: {shown}")


def data_of(text: str | None) -> DataConfig:
    """Read the option of :func:`add_data_option`.

    Raises:
        ConfigError: it is no such table.
    """
    return settings_from_table(DataConfig, _table(text or "{}", "--data", '{"split": "test"}'))


def read_prompts(
    options: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", context: int
) -> tuple[Prompts, dict[str, Any]]:
    """Read the prompts that the options name.

    Args:
        options: with those of :func:`add_prompt_options`, ``out`` and ``max_new_tokens``.

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
