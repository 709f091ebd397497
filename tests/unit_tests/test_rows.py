"""Prompts where they lie: the same rows in every form are the same prompts."""

import json
import os
import threading
from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tropd.base import text_files
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import DataConfig, PromptConfig, load_config
from megatron_tropd.config.run import config_from_dict, config_to_dict, config_to_toml
from megatron_tropd.data import rows
from megatron_tropd.data.prompts import Prompts, chosen, find_prompt, load_prompts, num_tokens
from megatron_tropd.tasks.graders import grade

ROWS = [{"prompt": f"né {i} " + "x" * i, "answer": str(i), "of": {"a": [i]}} for i in range(7)]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
THINKS = CHAT + "{% if enable_thinking is false %}[no]{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    """``datasets``, with a cache of this test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def _lines(ascii_only: bool) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in ROWS)


def _texts(prompts: Prompts) -> list[tuple]:
    return [(p.index, p.text, p.token_ids, p.fields["answer"], p.fields["of"]) for p in prompts]


@pytest.mark.parametrize("block", [1, 5, 2**20])
@pytest.mark.parametrize(
    ("content", "unit"),
    [
        (_lines(True).encode(), "line"),
        (_lines(False).replace("\n", "\r\n\r\n").encode("utf-8-sig"), "line"),
        (json.dumps(ROWS).encode(), "element"),
        (json.dumps(ROWS, ensure_ascii=False, indent=2).encode("utf-8-sig") + b"\r\n ", "element"),
    ],
)
def test_every_form_of_json_is_the_same_prompts(
    tmp_path: Path, tokenizer, monkeypatch, content: bytes, unit: str, block: int
):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    plain, path = tmp_path / "plain.jsonl", tmp_path / "file.json"
    plain.write_text(_lines(True))
    path.write_bytes(content)
    prompts = load_prompts(path, tokenizer)
    expected = _texts(load_prompts(plain, tokenizer))
    assert _texts(prompts) == expected and len(expected) == 7
    assert _texts(prompts[2:5]) == expected[2:5] and prompts[-1].index == 6
    assert prompts[3].place == f"{unit} {prompts[3].line}"
    assert num_tokens(prompts) == [len(p.token_ids) for p in prompts]
    with pytest.raises(IndexError):
        prompts[7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}, {"prompt": ]', "element 2: expected a JSON object, found Expecting"),
        ('[{"prompt": "a"}, 3]', "element 2: expected a JSON object, found int"),
        ('[{"prompt": "a"} {"prompt": "b"}]', r"element 1: expected ']' of the JSON array, found"),
        ('[{"prompt": "a"}', "element 1: expected ']' of the JSON array, found 'the end of the"),
        ('[{"prompt": "a"}] [', "expected nothing after the array, found"),
        ('[{"prompt": "a"}, {"prompt": " "}]', "element 2: the prompt is empty"),
        ("[]", "is empty"),
    ],
)
def test_a_broken_array_names_its_element(tmp_path: Path, tokenizer, content: str, message: str):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_prompts(path, tokenizer)
    path.write_bytes(b'[{"prompt": "\xe9"}]')
    with pytest.raises(InputError, match="expected UTF-8, found"):
        load_prompts(path, tokenizer)


def test_left_out_prompts_are_found_by_their_index(tmp_path: Path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in (1, 9, 2, 9, 3)))
    prompts = load_prompts(path, tokenizer, max_prompt_tokens=5, filter_overlong=True)
    for some in (prompts, list(prompts)):
        found = [find_prompt(some, index) for index in range(6)]
        assert [prompt and prompt.text for prompt in found] == ["a", None, "aa", None, "aaa", None]
        assert [p.text for p in chosen(some, lambda index: index > 0)] == ["aa", "aaa"]


def test_a_file_that_changes_is_noticed(tmp_path: Path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    prompts = load_prompts(path, tokenizer)
    path.rename(tmp_path / "aside")  # the file that was opened is still the same
    assert prompts[1].text == "cd"
    (tmp_path / "aside").write_text('{"prompt": "xyz"}\n{"prompt": "cd"}\n')
    with pytest.raises(InputError, match="was written to while it was in use"):
        prompts[0]


def test_a_pipe_is_read(tmp_path: Path, tokenizer):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(_lines(True),))
    writer.start()
    assert [p.text for p in load_prompts(path, tokenizer)] == [row["prompt"] for row in ROWS]
    writer.join()


NAMES = DataConfig(fields={"prompt": "q.text", "answer": "reward_model.0"})


def test_fields_have_our_names(tmp_path: Path, tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"q": {"text": "2+2"}, "reward_model": [4], "messages": []}) + "\n")
    (prompt,) = load_prompts(path, tokenizer, data=NAMES)
    assert (prompt.text, prompt.fields["answer"]) == ("2+2", 4)
    path.write_text('{"q": {"text": "1"}, "reward_model": [4]}\n{"q": {"text": "2"}}\n')
    with pytest.raises(InputError, match=r"line 2: data.fields has answer = 'reward_model.0', but"):
        load_prompts(path, tokenizer, data=NAMES)
    with pytest.raises(InputError, match=r"line 1: .* there is no 'words'. Found \['text'\]"):
        load_prompts(path, tokenizer, data=DataConfig(fields={"prompt": "q.words"}))


def test_a_template_makes_the_prompt(tmp_path: Path, tokenizer, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "2+2?", "choices": ["3", "4"]}\n')
    template = "{{ question }}{% for c in choices %}\n({{ 'AB'[loop.index0] }}) {{ c }}{% endfor %}"
    (prompt,) = load_prompts(path, tokenizer, PromptConfig(prompt_template=template))
    assert prompt.text == "2+2?\n(A) 3\n(B) 4"
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    settings = PromptConfig(
        prompt_template=r"{{ question }} \boxed{}", system_prompt="Be brief.",
        apply_chat_template=True,
    )  # fmt: skip
    (prompt,) = load_prompts(path, tokenizer, settings)
    assert prompt.text == r"[system]Be brief.[user]2+2? \boxed{}"
    for template, error, message in (
        ("{{ qestion }}", InputError, "line 1: .*'qestion' is undefined.*'question'"),
        ("{% if %}", ConfigError, "rollout.prompt_template is not valid"),
        ("{{ ''.__class__.mro() }}", InputError, "line 1: .*unsafe"),
    ):
        with pytest.raises(error, match=message):
            load_prompts(path, tokenizer, PromptConfig(prompt_template=template))
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(InputError, match='"messages" is a list of messages'):
        load_prompts(path, tokenizer, PromptConfig(prompt_template="a"))


def test_a_system_prompt_is_for_conversations_that_have_none(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    path, user = tmp_path / "p.jsonl", {"role": "user", "content": "u"}
    own = [{"role": "system", "content": "own"}, user]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in ([user], own)))
    settings = PromptConfig(system_prompt="S")
    texts = [p.text for p in load_prompts(path, tokenizer, settings)]
    assert texts == ["[system]S[user]u", "[system]own[user]u"]
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"line 1: rollout\.system_prompt is read by a chat templ"):
        load_prompts(path, tokenizer, settings)


def test_parquet_and_folders_of_splits(tmp_path: Path, tokenizer, library):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(_lines(True))
    expected = _texts(load_prompts(plain, tokenizer))
    folder, made = tmp_path / "set", library.Dataset.from_list(ROWS)
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        made.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    file = folder / "data" / "train-00000-of-00001.parquet"
    made.save_to_disk(str(tmp_path / "saved"))
    test = DataConfig(split="test")
    for path, data in ((file, DataConfig()), (folder, test), (tmp_path / "saved", DataConfig())):
        prompts = load_prompts(path, tokenizer, data=data)
        assert _texts(prompts) == expected, path
        assert prompts[6].place == "row 7"
    with pytest.raises(ConfigError, match=r"has the splits train, test\. Name one: data.split"):
        load_prompts(folder, tokenizer)
    with pytest.raises(InputError, match=r"cannot be read by `datasets` .*Unknown split .dev"):
        load_prompts(folder, tokenizer, data=DataConfig(split="dev"))
    with pytest.raises(ConfigError, match="is a single file, which has no split"):
        load_prompts(file, tokenizer, data=test)
    with pytest.raises(InputError, match=r"absent\.parquet cannot be read"):
        load_prompts(tmp_path / "absent.parquet", tokenizer)
    with pytest.raises(InputError, match=r"row 1: .*there is no 'q'"):
        load_prompts(file, tokenizer, data=NAMES)


def test_messages_of_parquet_are_those_of_json(tmp_path: Path, tokenizer, library, monkeypatch):
    """Arrow fills in null for the keys that other rows and parts have."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    parts = [{"type": "text", "text": "b", "image_url": None}]
    said = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "user", "content": parts, "name": "N"}], "tools": None},
    ]
    plain, path = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    plain.write_text("".join(json.dumps(row) + "\n" for row in said))
    library.Dataset.from_list(said).to_parquet(path)
    texts = [[p.text for p in load_prompts(file, tokenizer)] for file in (plain, path)]
    assert texts == [["[user]a", "[user]b"]] * 2


def test_a_data_set_of_the_hub_is_asked_of_the_library(tokenizer, library, monkeypatch, capsys):
    asked = []

    def load(*arguments, **more):
        asked.append((arguments, more))
        return library.Dataset.from_list(ROWS)

    monkeypatch.setattr(library, "load_dataset", load)
    data = DataConfig(subset="main", split="test")
    prompts = load_prompts("hf://datasets/someone/some", tokenizer, data=data)
    assert len(prompts) == 7
    assert asked == [(("someone/some", "main"), {"data_files": None, "split": "test"})]
    assert "taken from the local cache" in capsys.readouterr().err


def test_without_the_library_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(rows.sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-tropd\[tasks\]'"):
        load_prompts("hf://datasets/someone/some", tokenizer)


def test_settings_of_data_come_back_from_every_form(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nstudent = "s"\nteacher = "t"\n[rollout]\nprompts = "hf://datasets/a/b"\n'
        'max_new_tokens = 8\n[rollout.data]\nsplit = "train"\nfields = {prompt = "question"}\n'
        '[train]\nsteps = 1\ntokens_per_micro_batch = 64\n[run]\ndir = "runs/x"\n'
    )
    config = load_config(path, ["evaluation.problems=hf://datasets/a/b", "evaluation.data.split=t"])
    assert config.rollout.prompts == config.evaluation.problems == "hf://datasets/a/b"
    assert config.rollout.data == DataConfig(split="train", fields={"prompt": "question"})
    assert config.evaluation.data == DataConfig(split="t")
    assert config_from_dict(config_to_dict(config)) == config
    path.write_text(config_to_toml(config))
    assert load_config(path) == config


GSM8K = DataConfig(fields={"prompt": "question"})


def test_gsm8k_is_read_and_put_into_a_template(shared_data: Path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", THINKS)
    settings = load_config("examples/gsm8k/tropd.toml").rollout
    path = shared_data / "gsm8k" / "test.jsonl"
    prompts = load_prompts(path, tokenizer, settings, data=GSM8K)
    assert len(prompts) == 1319
    assert prompts[0].text.startswith("[user]Janet\u2019s ducks lay 16 eggs per day.")
    assert prompts[0].text.endswith("within \\boxed{}.[no]")
    assert grade(r"So \boxed{18}", prompts[0].fields["answer"]) is True
