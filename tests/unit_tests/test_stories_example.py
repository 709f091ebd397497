"""The stories example's own script, its two tools apart."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import write_tiny_tokenizer

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizers import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "stories" / "make_stories.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_stories", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Command line over a tokenizer without a model and 12 stories, 10 of them different."""
    write_tiny_tokenizer(tmp_path / "model")
    stories = [f"Story {i:02} begins and goes on." for i in range(10)]
    stories += ["too short", stories[0], stories[3] + " With another end."]
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    files = ("--model", tmp_path / "model", "--stories", tmp_path / "stories.json")
    numbers = ("--out", tmp_path / "out", "--prompt-tokens", 12, "--heldout", 4)
    return [str(argument) for argument in (*files, *numbers)]


def test_inputs_are_written(script: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "tropd", lambda *command: calls.append(command))
    for _ in range(2):  # a second call finds everything in place
        script.main(arguments)
    out = tmp_path / "out"
    tokenizer = load_tokenizer(out / "teacher")
    held_out = load_prompts(out / "heldout.jsonl", tokenizer)
    prompts = load_prompts(out / "prompts.jsonl", tokenizer)
    assert [p.text for p in [*held_out, *prompts]] == [f"Story {i:02} beg" for i in range(10)]
    assert len(held_out) == 4
    assert [call[0] for call in calls[:2]] == ["drop-layers", "responses"]


def test_bad_input(script: ModuleType, arguments: list[str], tmp_path: Path):
    with pytest.raises(InputError, match=r"gives 10 different prompts, no more than the 10"):
        script.main([*arguments, "--heldout", "10"])
    for text in ('{"a": 1}', "[1]", "[", ""):
        (tmp_path / "stories.json").write_text(text)
        with pytest.raises(InputError, match="Expected a JSON list of strings"):
            script.main(arguments)
    assert not (tmp_path / "out").exists()


def test_unspellable_stories_are_left_out(script: ModuleType, shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "models" / "babyllama-tok105-hd32")
    texts = script.first_tokens(["A cat sat on a mat.", "A\ncat sat on a mat."], tokenizer, 10)
    assert texts == ["A cat sat"]


def test_prompts_of_the_real_stories(script: ModuleType, shared_data: Path):
    stories = script.read_stories(shared_data / "tinystories" / "tinystories_1000.json")
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K-hd32")
    texts = script.first_tokens(stories, tokenizer, 24)
    assert len(texts) == len(set(texts)) > 900
    assert all(stories[0].startswith(text) for text in texts[:1])
