"""Chat templates: messages of a prompts file as a template takes them, and the text it makes.

Templates are programs of the model's author. Handed what they do not expect, most of them make some
text all the same: Python's spelling of a list, the word "None", a turn without its words. So
messages are brought into the one form that all templates take, and the text is looked through for
their words.
"""

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2.meta
import jinja2.nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from megatron_tropd.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OURS = {"messages", "add_generation_prompt", "strftime_now"}
_CLOCK = "strftime_now"
_NAME = jinja2.nodes.Name
_END_OF_THOUGHT = "</think>"  # what stands before it, templates leave out of earlier turns

Message = dict[str, Any]


def conversation(messages: Any, where: str) -> list[Message]:
    """Check messages and bring them into the form that every template takes: content is text.

    Args:
        messages: as the file has them: a list of objects with "role" and "content".

    Returns:
        New messages. One part of text became that text, an absent content beside tool calls the
        empty text, and arguments of calls that are JSON in a string became objects, as vLLM has it.

    Raises:
        InputError: a message is none, or is not text alone.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{where}: "messages" must be a list of {{"role", "content"}} objects, not empty, '
            f"found {messages!r:.60}."
        )
    return [_message(m, f"{where}: message {i}") for i, m in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(
            f'{where} must be an object such as {{"role": "user", "content": "..."}}, found '
            f"{message!r:.80}."
        )
    # Data sets fill in null for the keys of other messages; templates ask whether a key is there.
    checked = {key: value for key, value in message.items() if value is not None}
    if checked.get("function_call"):
        raise InputError(
            f"{where}: function_call is an older form that chat templates do not read. Write "
            '"tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {}}}].'
        )
    calls = checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = _tool_calls(calls, where)
    return checked | {"content": _content(message, where)}


def _content(message: Message, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        if message["role"] == "user" and not content.strip():
            raise InputError(f"{where} (user) is empty. Give it a text, or remove the line.")
        return content
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise InputError(
            f"{where} ({message['role']}) has no content. Give it a text, or remove the message; "
            "only a message with tool_calls may be without."
        )
    if not isinstance(content, list):
        raise InputError(
            f"{where}: content must be a text, found {content!r:.60}. Write it as a string."
        )
    kinds = [
        part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content
    ]
    if kinds != ["text"] or not isinstance(content[0].get("text"), str):
        raise InputError(
            f"{where}: content must be a text or one part of text, found parts {kinds}. Join texts "
            'to one: "content": "..."; images and sound cannot be prompts.'
        )
    return str(content[0]["text"])


def _tool_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: tool_calls must be a list of objects, found {calls!r:.60}.")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _tool_call(call["function"], where)}
    arguments = call.get("arguments") or {}  # as vLLM reads null and the empty text
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: the arguments of a tool call are not JSON ({error}): "
                f"{arguments!r:.60}. Write an object."
            ) from None
    if not isinstance(arguments, dict):
        raise InputError(
            f"{where}: the arguments of a tool call must be an object, found {arguments!r:.60}."
        )
    if not isinstance(call.get("name"), str):
        raise InputError(f"{where}: a tool call has no name, found keys {sorted(call)}. Add it.")
    return call | {"arguments": arguments}


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    arguments: Mapping[str, Any],
    *,
    date: datetime.date,
    where: str,
    beside: Collection[str] = (),
) -> str:
    """Make the text of a conversation, ready for the answer.

    Args:
        arguments: what else the template reads. Two are not its own: ``chat_template`` names one of
            several, ``continue_final_message`` has a last assistant message continued.
        date: what a template that reads the clock is told, at midnight.
        beside: further keys of the line, which no template is given.

    Returns:
        The text, with special tokens as the template writes them.

    Raises:
        InputError: there is no such template, it reads no such argument or one of ``beside``, it
            refuses the messages or drops words of them, or the last message is the assistant's and
            is not to be continued.
    """
    rest = dict(arguments)
    name, continued = rest.pop("chat_template", None), rest.pop("continue_final_message", False)
    template = choose_template(tokenizer, name, tools=bool(rest.get("tools")), where=where)
    _check_arguments(template, rest, where)
    if astray := sorted(_variables(template) & set(beside)):
        raise InputError(
            f"{where}: the chat template reads {', '.join(astray)}, but is given what stands in "
            '"chat_template_kwargs" of the line (or of the settings) alone. Move it there, or '
            "rename the key."
        )
    if not isinstance(continued, bool):
        raise InputError(
            f"{where}: continue_final_message must be true or false, found {continued!r:.60}."
        )
    if "tool_calls" not in template and any("tool_calls" in message for message in messages):
        raise InputError(
            f"{where}: the chat template does not read tool_calls of messages, and would drop "
            "them. Write the calls as content, or choose another template."
        )
    prefilled = messages[-1]["role"] == "assistant"
    if prefilled and not continued:
        raise InputError(
            f"{where}: the last message is the assistant's, so there is nothing to answer. Remove "
            'it, or add "continue_final_message": true to the line to have it continued.'
        )
    clock = datetime.datetime.combine(date, datetime.time()).strftime
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            chat_template=template,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
            **{**rest, _CLOCK: clock},
        )
    except Exception as error:  # a template is a program: it may raise whatever Python does
        raise InputError(
            f"{where}: the chat template refuses these messages ({error}). Change the messages "
            "to what the template takes."
        ) from None
    for number, message in enumerate(messages, start=1):
        _check_kept(message, str(text), f"{where}: message {number}")
    return str(text)


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", name: str | None, *, tools: bool, where: str
) -> str:
    """Find the template that transformers would take, or the one of a name.

    Args:
        name: which of several; None: "tool_use" with tools if there is one, else "default".

    Raises:
        InputError: there is none, or none of the name.
    """
    templates: Any = tokenizer.chat_template
    if not templates:
        raise InputError(
            f"{where}: needs a chat template, but the tokenizer has none. Give plain "
            '"prompt" strings with rollout.apply_chat_template = false, or add the template.'
        )
    if isinstance(templates, str):
        if name is None:
            return templates
        raise InputError(
            f"{where}: chat_template_kwargs asks for the chat template {name!r}, but the tokenizer "
            "has a single one, without a name. Remove chat_template."
        )
    wanted = name or ("tool_use" if tools and "tool_use" in templates else "default")
    if wanted not in templates:
        raise InputError(
            f"{where}: the tokenizer has no chat template {wanted!r}, but {', '.join(templates)}. "
            "Choose one of them: rollout.chat_template_kwargs = {chat_template = "
            f'"{next(iter(templates))}"}}.'
        )
    return str(templates[wanted])


def reads_clock(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a chat template of the tokenizer asks what day it is."""
    templates: Any = tokenizer.chat_template or {}
    texts = [templates] if isinstance(templates, str) else list(templates.values())
    return any(_CLOCK in text for text in texts)


def _check_arguments(template: str, arguments: Mapping[str, Any], where: str) -> None:
    known = _variables(template) - _OURS
    if unknown := sorted(arguments.keys() - known):
        raise InputError(
            f"{where}: the chat template does not read {', '.join(unknown)} (from "
            "rollout.chat_template_kwargs or from the line). Remove it or correct the name; the "
            f"template reads {', '.join(sorted(known)) or 'nothing beside the messages'}."
        )
    for name, value in arguments.items():
        spelled = isinstance(value, str) and value.lower() in ("true", "false")
        if spelled or (name in _flags(template) and not isinstance(value, bool | None)):
            raise InputError(
                f"{where}: {name} of the chat template must be true or false, found {value!r:.60}: "
                "the template would take it for something else. Write it without quotes."
            )
    tools = arguments.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f'{where}: "tools" must be a list of JSON schemas, found {tools!r:.60}.')


def _parsed(template: str) -> tuple[jinja2.Environment, jinja2.nodes.Template]:
    try:
        environment = _compile_jinja_template(template).environment
        return environment, environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"The chat template is not valid ({error}, line {error.lineno}). Copy the tokenizer's "
            "files of the model again."
        ) from None


@lru_cache
def _flags(template: str) -> frozenset[str]:
    """Names that a template compares with true or false: ``enable_thinking is false``."""
    tests = _parsed(template)[1].find_all(jinja2.nodes.Test)
    compared = [t.node for t in tests if t.name in ("true", "false", "boolean")]
    return frozenset(node.name for node in compared if isinstance(node, _NAME))


@lru_cache
def _variables(template: str) -> frozenset[str]:
    """Names that a template asks its caller for."""
    environment, tree = _parsed(template)
    if any(node.name == "random" for node in tree.find_all(jinja2.nodes.Filter)):
        raise InputError(
            "The chat template draws at random (its filter `random`), so that a prompt is another "
            "one at each reading. Change the template."
        )
    tests = tree.find_all(jinja2.nodes.Test)
    asked = {t.node.name for t in tests if t.name == "defined" and isinstance(t.node, _NAME)}
    own = {name.name for name in tree.find_all(_NAME) if name.ctx == "store"}
    # What is set in a branch counts as undeclared too, but a default follows "is defined".
    read = jinja2.meta.find_undeclared_variables(tree) - (own - asked)
    return frozenset(read - environment.globals.keys())


def _check_kept(message: Message, text: str, where: str) -> None:
    """Refuse a template that drops a message, or its content."""
    words = message["content"].strip()
    if message["role"] == "assistant":
        if message.get("tool_calls"):  # what is said beside a call is a thought to some templates
            return
        words = words.rpartition(_END_OF_THOUGHT)[2].strip()
    # Some templates write what a tool returned as a JSON string.
    if words not in text and json.dumps(words, ensure_ascii=False)[1:-1] not in text:
        raise InputError(
            f"{where} ({message['role']}) does not appear in the text that the chat template "
            f"makes: {words!r:.60}. Change the messages to what the template takes, or write the "
            'whole text yourself as "prompt", with rollout.apply_chat_template = false.'
        )
