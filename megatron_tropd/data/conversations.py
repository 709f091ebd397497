"""Conversations of several turns as token ids, appended to and never made again.

What was sampled stays as it was sampled: a turn's own ids are kept, and only what the chat template
writes after it is tokenized. A server that renders the whole conversation anew may read the same
texts as other ids; training on these would be training on what nobody sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import EnvironmentConfig, PromptConfig
from megatron_tropd.data.prompts import PromptLine, is_templated, tokenize_line
from megatron_tropd.data.templates import Message, conversation
from megatron_tropd.data.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "A text of 1 line."


@dataclass(frozen=True)
class Talk:
    """How conversations of a run become ids."""

    tokenizer: "PreTrainedTokenizerBase"
    settings: PromptConfig
    turn_stops: tuple[int, ...] = ()
    """Ids that end a turn and are part of its text (``environment.stop_token_ids``)."""

    def opening(self, prompt: Prompt, messages: Any) -> tuple[Prompt, list[Message]]:
        """Make ids of the messages that an episode begins with.

        Args:
            messages: as the environment gave them; None: those of the prompt.

        Returns:
            The prompt with these ids, and its messages.

        Raises:
            InputError: they are no messages, or the template refuses them.
        """
        fields = prompt.fields
        if messages is not None:
            given = conversation(messages, _where(prompt))
            fields = {key: value for key, value in fields.items() if key != "prompt"}
            fields = fields | {"messages": given}
            text, ids = tokenize_line(fields, self.tokenizer, self.settings, _where(prompt), ())
            prompt = replace(prompt, text=text, token_ids=ids, fields=fields)
        line = PromptLine(fields, self.tokenizer, self.settings, _where(prompt))
        return prompt, line.messages() or []

    def text_of(self, turn: Sequence[int], *, stopped: bool) -> str:
        """Spell what the student wrote, without the id that closes the turn."""
        closed = stopped and turn[-1] not in self.turn_stops
        return str(self.tokenizer.decode(list(turn[:-1] if closed else turn)))

    def same_again(self, turn: Sequence[int], text: str, *, stopped: bool) -> bool:
        """Whether the text of a turn is tokenized as it was sampled."""
        closed = stopped and turn[-1] not in self.turn_stops
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return bool(ids == list(turn[:-1] if closed else turn))

    def after(
        self, prompt: Prompt, before: list[Message], messages: list[Message]
    ) -> tuple[int, ...]:
        """Make ids of what the template writes after a turn: its closing, and messages.

        Args:
            prompt: of the episode.
            before: the conversation up to the turn.
            messages: what the environment says.

        Raises:
            InputError: the template refuses the messages.
        """
        where = _where(prompt)
        line = PromptLine(prompt.fields, self.tokenizer, self.settings, where)
        mark = _mark_beside([*before, *messages])
        text = line.rendered([*before, {"role": "assistant", "content": mark}, *messages])
        head, found, tail = text.partition(mark)
        if not found or mark in tail:
            raise InputError(f"{where}: the chat template does not write a turn once.")
        try:
            tail.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: a message holds half a surrogate pair.") from None
        encode = self.tokenizer.encode
        whole = encode(text, add_special_tokens=False, verbose=False)
        until = encode(head + mark, add_special_tokens=False, verbose=False)
        if whole[: len(until)] == until:
            return tuple(whole[len(until) :])
        return tuple(encode(tail, add_special_tokens=False, verbose=False))

    def check(self, prompts: Sequence[Prompt], stops: Sequence[int]) -> None:
        """Refuse a tokenizer whose turns nothing would end, or none of whose prompts is one.

        Args:
            stops: ids that end a response.

        Raises:
            ConfigError: says what to set.
        """
        prompt = prompts[0]
        if not is_templated(prompt.fields, self.settings):
            raise ConfigError(
                "[environment] speaks in messages, but the prompts are plain text. Set "
                'rollout.apply_chat_template = true, or write "messages" into the prompts.'
            )
        prompt, before = self.opening(prompt, None)
        closing = self.after(prompt, before, [{"role": "user", "content": _PROBE}])
        if closing[0] not in stops and not self.turn_stops:
            raise ConfigError(
                "The chat template closes a turn with "
                f"{self.tokenizer.decode([closing[0]])!r} (id {closing[0]}), which ends no "
                f"response: the ids that do are {sorted(stops)}. Add it to eos_token_id in the "
                "student's generation_config.json, or name ids in environment.stop_token_ids."
            )


def talk_of(
    environment: EnvironmentConfig | None,
    tokenizer: "PreTrainedTokenizerBase",
    settings: PromptConfig,
) -> Talk | None:
    """How a run's conversations become ids; None: it has no environment."""
    if environment is None:
        return None
    return Talk(tokenizer, settings, environment.stop_token_ids)


def _where(prompt: Prompt) -> str:
    return f"the episode of {prompt.place}"


def _mark_beside(messages: list[Message]) -> str:
    """A text that none of the messages holds."""
    texts, number = [str(message) for message in messages], 0
    while any(f"turn{number}turn" in text for text in texts):
        number += 1
    return f"turn{number}turn"
