"""Chat templates: what users' messages become; what is refused, with what to write instead."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import PromptConfig
from megatron_tropd.data.prompts import check_kwargs_are_read, check_same_texts, load_prompts
from megatron_tropd.data.templates import reads_clock
from megatron_tropd.data.tokenizers import load_tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.arguments | tojson }}>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


def _tokenizer(folder: Path, template: Any) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def chat(folder: Path) -> PreTrainedTokenizerBase:
    return _tokenizer(folder, PLAIN)


def _file(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def text(tmp_path: Path, chat: PreTrainedTokenizerBase):
    """The text of one line."""

    def make(line: dict[str, Any], tokenizer: Any = chat, **settings: Any) -> str:
        (prompt,) = load_prompts(_file(tmp_path, line), tokenizer, PromptConfig(**settings))
        return prompt.text

    return make


def test_messages_may_stand_under_prompt(text):
    assert text({"prompt": [USER]}) == text({"messages": [USER]}) == "<s>[user]u[assistant]"


def test_one_part_of_text_is_that_text(text):
    parts = [{"type": "text", "text": "u"}]
    assert text({"messages": [{"role": "user", "content": parts}]}) == text({"messages": [USER]})


def test_tool_calls_and_their_results(text):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    line = {"messages": [USER, called, {"role": "tool", "content": "4"}]}
    assert text(line) == '<s>[user]u[assistant]<{"x": 1}>[tool]4[assistant]'
    del called["content"]
    assert text(line) == '<s>[user]u[assistant]<{"x": 1}>[tool]4[assistant]'


def test_keys_that_are_null_are_not_there(text, folder: Path):
    asking = "{% for m in messages %}{% if 'tool_calls' in m %}CALLS{% endif %}{% endfor %}" + PLAIN
    filled = [m | {"tool_calls": calls, "name": None} for m, calls in ((USER, None), (ANSWER, []))]
    found = text({"messages": [*filled, USER]}, _tokenizer(folder, asking))
    assert found == "<s>[user]u[assistant]a[user]u[assistant]"


def test_a_last_turn_of_the_assistant_is_continued_if_asked_for(text):
    line = {"messages": [USER, ANSWER]}
    expected = "<s>[user]u[assistant]a"
    assert text(line | {"continue_final_message": True}) == expected
    assert text(line, chat_template_kwargs={"continue_final_message": True}) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [USER, ANSWER]}, 'nothing to answer. Remove it, or add "continue_final_me'),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": " "}]}, r"message 1 \(user\) is empty"),
        ({"messages": [USER, {"role": "tool"}]}, r"message 2 \(tool\) has no content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"found parts \['image_url'\].*images",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]},
            r"found parts \['text', 'text'\]. Join texts",
        ),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "content must be a text"),
        ({"messages": "u"}, "must be a list.*found 'u'"),
        ({"prompt": {"role": "user"}}, r"expected \"prompt\".*Write \{\"prompt\""),
        ({"conversations": [{"from": "human"}]}, r"found keys \['conversations'\]. Write \{"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": "{"}]}]},
            "message 2: the arguments of a tool call are not JSON",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]},
                ]
            },
            "message 2: the arguments of a tool call must be an object, found 3",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": None}]}]},
            "message 2: a tool call has no name",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": "", "function_call": {"name": "f"}},
                ]
            },
            'message 2: function_call is an older form.*Write "tool_calls"',
        ),
        (
            {"messages": [USER, ANSWER], "continue_final_message": "false"},
            "continue_final_message must be true or false, found 'false'",
        ),
        ({"prompt": 5}, r"expected \"prompt\".*found prompt 5. Write \{"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "the chat template does not read tools"),
        ({"messages": [USER], "chat_template_kwargs": 3}, '"chat_template_kwargs" must be an obj'),
        (
            {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
            "does not read enable_thinking .*the template reads bos_token",
        ),
    ],
)
def test_refused_lines_say_what_to_write(tmp_path: Path, chat, line, message: str):
    path = _file(tmp_path, {"messages": [USER]}, line)
    with pytest.raises(InputError, match=rf"prompts\.jsonl, line 2: .*{message}"):
        load_prompts(path, chat)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_drops_words_is_noticed(text, folder: Path, template: str):
    line = {"messages": [{"role": "system", "content": "s"}, USER]}
    with pytest.raises(InputError, match=r"message 1 \(system\) does not appear in the text"):
        text(line, _tokenizer(folder, template))


def test_a_template_may_fail_in_any_way(text, folder: Path):
    for template in (
        "{{ 1 + messages }}",
        "{{ messages[7].content }}",
        "{{ raise_exception('x') }}",
    ):
        with pytest.raises(InputError, match="line 1: the chat template refuses these messages"):
            text({"messages": [USER]}, _tokenizer(folder, template))
    with pytest.raises(InputError, match="The chat template is not valid"):
        text({"messages": [USER]}, _tokenizer(folder, "{% for %}"))
    with pytest.raises(InputError, match="draws at random"):
        text({"messages": [USER]}, _tokenizer(folder, "{{ messages | random }}"))


def test_templates_under_names(text, folder: Path):
    named = {name: f"{{# {name} #}}{name}:{{{{ tools }}}}" + PLAIN for name in ("rag", "tool_use")}
    tokenizer = _tokenizer(folder, named)
    line = {"messages": [USER]}
    with pytest.raises(InputError, match=r"no chat template 'default', but rag, tool_use\. Choose"):
        text(line, tokenizer)
    assert text(line, tokenizer, chat_template_kwargs={"chat_template": "rag"}).startswith("rag:")
    assert text(line | {"tools": [{"name": "f"}]}, tokenizer).startswith("tool_use:")
    tokenizer.chat_template = named | {"default": "default:" + PLAIN}
    assert text(line, tokenizer).startswith("default:")
    with pytest.raises(InputError, match="no chat template 'x'"):
        text(line, tokenizer, chat_template_kwargs={"chat_template": "x"})


def test_the_clock_of_a_template_stands_still(text, folder: Path):
    tokenizer = _tokenizer(folder, "{{ strftime_now('%d %b %Y %H:%M') }}" + PLAIN)
    line = {"messages": [USER]}
    found = text(line, tokenizer, chat_template_date="2026-01-31")
    assert found.startswith("31 Jan 2026 00:00<s>")
    today = datetime.date.today().strftime("%d %b %Y")
    assert text(line, tokenizer).startswith(today)
    assert reads_clock(tokenizer) and not reads_clock(_tokenizer(folder, PLAIN))
    with pytest.raises(InputError, match="does not read strftime_now"):
        text(line, tokenizer, chat_template_kwargs={"strftime_now": "x"})


def test_arguments_come_from_the_settings_and_before_them_from_the_line(text, folder: Path):
    tokenizer = _tokenizer(folder, "{{ effort }}" + PLAIN)
    low, line = {"effort": "low"}, {"messages": [USER]}
    assert text(line, tokenizer, chat_template_kwargs=low).startswith("low")
    high = line | {"chat_template_kwargs": {"effort": "high"}}
    assert text(high, tokenizer, chat_template_kwargs=low).startswith("high")


def test_names_that_a_template_sets_itself_are_no_arguments(text, folder: Path):
    template = (
        "{% if not day is defined %}{% set day = 'Monday' %}{% endif %}{{ day }}"
        "{% if messages %}{% set words = messages[0].content %}{% endif %}{{ words }}"
    )
    tokenizer, line = _tokenizer(folder, template), {"messages": [USER]}
    assert text(line, tokenizer) == "Mondayu"
    assert text(line, tokenizer, chat_template_kwargs={"day": "Friday"}) == "Fridayu"
    with pytest.raises(InputError, match=r"does not read words .* template reads day\."):
        text(line, tokenizer, chat_template_kwargs={"words": "x"})


THINKING = "{% if enable_thinking is defined and enable_thinking is false %}SILENT{% endif %}"


def test_an_argument_beside_the_messages_is_not_silently_dropped(text, folder: Path):
    tokenizer, line = _tokenizer(folder, THINKING + PLAIN), {"messages": [USER]}
    with pytest.raises(InputError, match=r'reads enable_thinking.*"chat_template_kwargs".*Move it'):
        text(line | {"enable_thinking": False}, tokenizer)
    assert text(line | {"enable_thinking": None, "answer": "4"}, tokenizer).startswith("<s>")
    assert text({"prompt": "u", "enable_thinking": False}, tokenizer) == "u"  # no template


def test_a_switch_of_a_template_takes_true_and_false_alone(text, folder: Path):
    tokenizer, line = _tokenizer(folder, "{{ effort }}" + THINKING + PLAIN), {"messages": [USER]}
    off = {"enable_thinking": False}
    assert text(line, tokenizer, chat_template_kwargs=off).startswith("SILENT")
    for value in ("false", "no", 0):
        with pytest.raises(InputError, match=r"enable_thinking .* must be true or false, found"):
            text(line | {"chat_template_kwargs": {"enable_thinking": value}}, tokenizer)
    with pytest.raises(InputError, match=r"effort .* must be true or false, found 'False'"):
        text(line, tokenizer, chat_template_kwargs={"effort": "False"})


def test_a_text_is_not_rendered_twice(text, folder: Path):
    header = "<unk>{{ messages[0].content }}"
    for begin, template in (("<unk>", header), ("<s>", PLAIN), ("<s>", header)):
        with pytest.raises(
            InputError, match=f"begins with {begin}, which the chat template writes"
        ):
            text({"prompt": f"{begin}u"}, _tokenizer(folder, template), apply_chat_template=True)
    assert text({"prompt": "<unk>u"}, _tokenizer(folder, PLAIN), apply_chat_template=True)


def test_a_template_that_reads_no_tool_calls_is_noticed(text, folder: Path):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    deaf = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="does not read tool_calls of messages"):
        text({"messages": [USER, called, USER]}, _tokenizer(folder, deaf))


def test_calls_without_arguments_have_none(text):
    for arguments in (None, "", "{}", {}):
        call = {"function": {"name": "f", "arguments": arguments}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert "<{}>" in text({"messages": [USER, called, USER]})


def test_arguments_that_no_prompt_reads_are_refused(tmp_path: Path, chat):
    settings = PromptConfig(chat_template_kwargs={"effort": "low"})
    prompts = load_prompts(_file(tmp_path, {"prompt": "a"}), chat, settings)
    with pytest.raises(ConfigError, match="every prompt is plain text"):
        check_kwargs_are_read(prompts, settings)


def test_templates_of_a_pair_are_compared_by_their_texts(tmp_path: Path, chat, folder: Path):
    settings = PromptConfig()
    path = _file(tmp_path, {"prompt": "a"}, {"messages": [USER]})
    prompts = load_prompts(path, chat, settings)

    def check(template: str | None) -> None:
        check_same_texts(path, prompts, chat, _tokenizer(folder, template), settings)

    check(PLAIN)
    check("{% if messages[0].role == 'system' %}SYSTEM{% endif %}" + PLAIN)  # not used here
    with pytest.raises(
        InputError,
        match=r"line 2: .* different texts. From character 4 .*'<s>\[user\]u.*'<s>\[Xuse",
    ):
        check(PLAIN.replace("[{{ m.role", "[X{{ m.role"))
    with pytest.raises(InputError, match=r"makes no text .*line 2: needs a chat template"):
        check(None)
    check_same_texts(path, prompts[:1], chat, _tokenizer(folder, None), settings)


def test_users_files_with_the_template_of_qwen3(text, shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "hf-meta" / "Qwen3-1.7B")
    files = shared_data / "user_files" / "prompts"
    texts = {p.stem: _texts(p, tokenizer) for p in files.glob("*.jsonl") if "last" not in p.stem}
    assert texts["content_parts"] == texts["messages"]
    assert texts["messages"][1] == (
        "<|im_start|>user\nOnce upon a time 1<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts["prompt_is_messages"][0].startswith("<|im_start|>user\n2+2?<|im_end|>")
    assert "None" not in texts["content_null"][0]
    assert '{"name": "f", "arguments": {}}' in texts["content_null"][0]
    with pytest.raises(InputError, match="line 1: the last message is the assistant's"):
        load_prompts(files / "assistant_last.jsonl", tokenizer)
    line = {"messages": [USER]}
    silent = text(line, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert silent == text(line, tokenizer) + "<think>\n\n</think>\n\n"
    tools = text(line | {"tools": [CALL]}, tokenizer)
    assert tools.startswith("<|im_start|>system\n# Tools") and json.dumps(CALL) in tools
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}
    assert "assistant\nfour<|im_end|>" in text({"messages": [USER, thought, USER]}, tokenizer)


def _texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [prompt.text for prompt in load_prompts(path, tokenizer)]
