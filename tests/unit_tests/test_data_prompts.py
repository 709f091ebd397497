"""Prompts: the file, its errors, and the order of the steps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import PromptConfig
from megatron_tropd.data.prompts import load_prompts, prompts_of_step

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, monkeypatch) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def _file(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_plain_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = _file(tmp_path, {"prompt": "ab", "answer": "3"}, "", {"prompt": " é\n"})
    first, second = load_prompts(path, tokenizer)
    assert (first.index, second.index) == (0, 1)
    assert (first.text, first.fields["answer"]) == ("ab", "3")
    assert list(first.token_ids) == tokenizer.encode("ab")
    assert tokenizer.decode(second.token_ids, skip_special_tokens=True) == " é\n"


def test_chat_template(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = _file(tmp_path, {"messages": messages}, {"prompt": "ab"})
    chat, plain = load_prompts(path, chat_tokenizer)
    assert chat.text == "<s>[system]s[user]u[assistant]"
    assert plain.text == "ab"
    _, wrapped = load_prompts(path, chat_tokenizer, PromptConfig(apply_chat_template=True))
    assert wrapped.text == "<s>[user]ab[assistant]"
    for prompt in (chat, wrapped):
        assert prompt.token_ids.count(chat_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "is empty"),
        (("", "  "), "is empty"),
        (({"prompt": "a"}, "{not json"), "line 2: expected a JSON object"),
        (({"prompt": "a"}, "", "[1]"), "line 3: expected a JSON object, found list"),
        (({"text": "a"},), r"line 1: expected \"prompt\".*found keys \['text'\]"),
        (({"prompt": 3},), r"line 1: expected \"prompt\" \(a string\)"),
        (({"prompt": "a"}, {"prompt": " \n"}), "line 2: the prompt is empty"),
        (
            ({"prompt": "a" * 9}, {"prompt": "a"}, "", {"prompt": "a" * 12}),
            r"jsonl, line 1 \(9 tokens\), line 4 \(12 tokens\): 2 of 3 prompts .*at most 8 fit",
        ),
        (
            ({"prompt": "ab\ud800"},),
            "line 1: the prompt holds half a surrogate pair at character 2",
        ),
        (({"messages": []},), 'line 1: "messages" must be a list'),
        (({"messages": [{"content": "u"}]},), "line 1: message 1 must be an object such as"),
        (({"prompt": "a", "messages": []},), 'line 1: found both "prompt" and "messages"'),
        (({"prompt": "a", "tools": [{}]},), "line 1: tools would be read by a chat template"),
        (
            ({"messages": [{"role": "user", "content": "u"}]},),
            "line 1: needs a chat template, but the tokenizer has none",
        ),
    ],
)
def test_bad_files(tmp_path: Path, tokenizer, lines: tuple, message: str):
    path = _file(tmp_path, *lines)
    with pytest.raises(InputError, match=message):
        load_prompts(path, tokenizer, max_prompt_tokens=8)


def test_messages_the_template_refuses(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    path = _file(tmp_path, {"prompt": "a"}, {"messages": [{"role": "user", "content": "u"}]})
    with pytest.raises(InputError, match=r"line 2: the chat template refuses .*roles must alt"):
        load_prompts(path, tokenizer)


def test_unreadable_files(tmp_path: Path, tokenizer):
    with pytest.raises(InputError, match=r"absent\.jsonl cannot be read: No such file"):
        load_prompts(tmp_path / "absent.jsonl", tokenizer)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(InputError, match=r"line 2: expected a JSON object, found .*utf-8"):
        load_prompts(path, tokenizer)


def test_long_prompts_can_be_left_out(tmp_path: Path, tokenizer, capsys):
    """The others keep their places in the file, which key their draws and name their responses."""
    path = _file(tmp_path, {"prompt": "a" * 9}, {"prompt": "b"}, "", {"prompt": "c"})
    kept = load_prompts(path, tokenizer, max_prompt_tokens=8, filter_overlong=True)
    assert [(p.text, p.index, p.line) for p in kept] == [("b", 1, 2), ("c", 2, 4)]
    warning = capsys.readouterr().err
    assert "1 of 3 prompts are left out" in warning and "line 1 (9 tokens)" in warning
    path = _file(tmp_path, {"prompt": "a" * 9})
    with pytest.raises(InputError, match="1 of 1 prompts are too long"):
        load_prompts(path, tokenizer, max_prompt_tokens=8, filter_overlong=True)
    with pytest.raises(InputError, match=r"allow fewer new tokens\.$"):  # of held-out problems
        load_prompts(path, tokenizer, max_prompt_tokens=8, filter_overlong=None)


@pytest.fixture
def affixes(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """A tokenizer whose post-processor puts BOS before a text and EOS after it."""
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    yield tokenizer
    tokenizer.backend_tokenizer.post_processor = before or TemplateProcessing(
        single="$A", special_tokens=[]
    )


def test_a_prompt_begins_with_bos_once_and_does_not_end(tmp_path: Path, affixes, monkeypatch):
    assert affixes.encode("ab")[-1] == affixes.eos_token_id
    path = _file(tmp_path, {"prompt": "ab"}, {"prompt": "<s>ab"}, {"prompt": "<s>"})
    plain, marked, alone = load_prompts(path, affixes)
    ab = affixes.encode("ab", add_special_tokens=False)
    assert list(plain.token_ids) == list(marked.token_ids) == [1, *ab]
    assert alone.token_ids == (1,)
    with pytest.raises(InputError, match="line 1: the prompt begins with <s> twice"):
        load_prompts(_file(tmp_path, {"prompt": "<s><s>ab"}), affixes)
    monkeypatch.setattr(affixes, "chat_template", TEMPLATE)
    (chat,) = load_prompts(_file(tmp_path, {"prompt": [{"role": "u", "content": "a"}]}), affixes)
    assert chat.token_ids.count(1) == 1 and 2 not in chat.token_ids
    with pytest.raises(InputError, match=r"line 1: .*which the chat template writes"):
        load_prompts(
            _file(tmp_path, {"prompt": "<s>a"}), affixes, PromptConfig(apply_chat_template=True)
        )


def test_steps_walk_through_epochs():
    n, per_step = 23, 5
    epochs = [
        [i for step in range(4 * e, 4 * e + 4) for i in prompts_of_step(n, per_step, step, 1)]
        for e in range(40)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) < set(range(23))
    assert set().union(*epochs) == set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 40
    counts = [sum(epoch.count(i) for epoch in epochs) for i in range(23)]
    assert min(counts) >= 25


def test_order_is_keyed_and_stateless():
    late = prompts_of_step(100, 8, 1234, 1)
    assert [prompts_of_step(100, 8, s, 1) for s in (3, 1234, 0)][1] == late
    assert prompts_of_step(100, 8, 1234, 2) != late
    assert sorted(prompts_of_step(7, 7, 3, 1)) == list(range(7))


def test_fewer_prompts_than_a_step_needs():
    with pytest.raises(ConfigError, match="prompts_per_step = 8 exceeds the 7 prompts"):
        prompts_of_step(7, 8, 0, 1)
