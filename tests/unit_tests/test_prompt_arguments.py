"""The tools read prompts as the trainer does, and go on with the date that they began with."""

import argparse
import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.base import exits
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli.main import main, parse
from megatron_tropd.config import PromptConfig
from megatron_tropd.config.run_defaults import add_prompt_options
from megatron_tropd.data.arguments import read_prompts
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.responses import load_responses
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.distill import engines

TEMPLATE = "{{ strftime_now('%d %b') }}{{ effort }}{{ messages[0].content }}"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "b" * n}) + "\n" for n in (1, 60)))
    return path


def _options(prompts: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prompt_options(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--max-new-tokens", type=int)
    out = prompts.with_name("out.jsonl")
    fixed = ["--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "8"]
    return parser.parse_args([*fixed, *more])


def test_the_ids_are_the_trainers(prompts: Path, tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    options = ["--apply-chat-template", "--chat-template-kwargs", '{"effort": "low"}']
    options += ["--chat-template-date", "2026-01-31", "--filter-overlong-prompts"]
    found, recorded = read_prompts(_options(prompts, *options), tokenizer, 64)
    settings = PromptConfig(
        apply_chat_template=True,
        chat_template_kwargs={"effort": "low"},
        chat_template_date="2026-01-31",
    )
    assert list(found) == list(load_prompts(prompts, tokenizer, settings)[:1])
    assert found[0].text == "31 Janlowb"
    assert recorded == {
        "chat_template_kwargs": {"effort": "low"},
        "chat_template_date": "2026-01-31",
    }


def test_a_file_is_continued_with_the_date_it_began_with(prompts: Path, tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = TEMPLATE.replace("{{ effort }}", "")
    options = _options(prompts, "--apply-chat-template")
    _, recorded = read_prompts(options, tokenizer, 100)
    assert recorded == {"chat_template_date": datetime.date.today().isoformat()}
    settings = {"chat_template_date": "2026-01-31"}
    options.out.write_text(json.dumps({"settings": settings}) + "\n")
    (prompt, _), recorded = read_prompts(options, tokenizer, 100)
    assert prompt.text == "31 Janb" and recorded == settings
    for torn in ('{"settings": {', "[]\n", '{"settings": 3}\n'):
        options.out.write_text(torn)
        assert read_prompts(options, tokenizer, 100)[1] != settings


def test_plain_prompts_leave_the_header_as_it_was(prompts: Path, tiny_llama: Path):
    assert read_prompts(_options(prompts), load_tokenizer(tiny_llama), 100)[1] == {}


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ((), 8, r"--max-new-tokens must be in 1\.\.7"),
        (("--chat-template-kwargs", "x"), 100, "must be a JSON object such as .*found 'x'"),
        (("--chat-template-kwargs", "[]"), 100, "must be a JSON object"),
        (("--chat-template-kwargs", '{"a": 1}'), 100, "every prompt is plain text"),
        (("--chat-template-date", "today"), 100, "must look like 2026-01-31"),
    ],
)
def test_options_out_of_range(prompts: Path, tiny_llama: Path, options, context: int, message: str):
    with pytest.raises(ConfigError, match=message):
        read_prompts(_options(prompts, *options), load_tokenizer(tiny_llama), context)


class _Engine:
    """Answers every request with the same two tokens."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def generate(self, requests: list[SampleRequest], _: Sampling) -> list[Sample]:
        """The answers."""
        return [Sample((5, 2), (-1.0, -1.0), "stop") for _ in requests]

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(("command", "model"), [("rollouts", "student"), ("responses", "teacher")])
def test_the_commands_write_what_the_template_read(
    prompts: Path, tmp_path: Path, tiny_llama: Path, monkeypatch, command: str, model: str
):
    """The trainer with the same settings takes the responses; with others it says which."""
    folder = tmp_path / model
    shutil.copytree(tiny_llama, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    monkeypatch.setattr(engines, "RolloutEngine", _Engine)
    out = tmp_path / "out.jsonl"
    options = [f"--{model}", str(folder), "--prompts", str(prompts), "--out", str(out)]
    options += ["--max-new-tokens", "200", "--apply-chat-template", "--filter-overlong-prompts"]
    options += ["--chat-template-kwargs", '{"effort": "low"}', "--chat-template-date", "2026-01-31"]
    assert main([command, *options]) == 0
    assert main([command, *options[:-2]]) == 0  # another day: the file's date goes on
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header["settings"]["chat_template_kwargs"] == {"effort": "low"}
    assert header["settings"]["chat_template_date"] == "2026-01-31"
    name = "prompt_index" if command == "responses" else "prompt"
    assert {line[name] for line in lines} == {0}
    if command == "responses":
        settings = PromptConfig(
            apply_chat_template=True,
            chat_template_kwargs={"effort": "low"},
            chat_template_date="2026-01-31",
        )
        tokenizer = load_tokenizer(folder)
        same = load_prompts(prompts, tokenizer, settings)[:1]
        assert load_responses(out, same, tokenizer)[0][0].token_ids == (5, 2)
        other = load_prompts(prompts, tokenizer, replace(settings, chat_template_date=None))[:1]
        with pytest.raises(InputError, match=r"rollout\.chat_template_date = '2026-01-31'"):
            load_responses(out, other, tokenizer)


def test_both_commands_have_the_options(prompts: Path):
    options = ["--prompts", "p", "--out", "o", "--max-new-tokens", "8", "--chat-template-date", "x"]
    for command, model in (("rollouts", "--student"), ("responses", "--teacher")):
        assert parse([command, model, "m", *options]).chat_template_date == "x"


@pytest.mark.parametrize("command", ["rollouts", "responses"])
def test_a_run_that_is_not_there_is_a_user_s_mistake(command: str, capsys):
    assert main([command, "--run", "absent.toml", "--out", "out.jsonl"]) == exits.CONFIG
    assert "absent.toml does not exist" in capsys.readouterr().err
