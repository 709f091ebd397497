"""Teacher responses: the file's format, and every way it can fail to fit the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.responses import (
    TeacherResponse,
    header_record,
    load_responses,
    response_record,
)
from megatron_tropd.data.resumable import ResumableLines
from megatron_tropd.data.types import Prompt

PROMPTS = [Prompt(i, f"p{i}", (1, 5 + i), {}) for i in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def _records(tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Header and two responses to each prompt, the second samples first."""
    records = [header_record(tokenizer, {"temperature": 1.0})]
    for sample in (1, 0):
        for prompt in PROMPTS:
            response = TeacherResponse(prompt.index, sample, (30 + sample, 2), "stop")
            records.append(response_record(prompt, response, text="x", seed=1))
    return records


def _write(folder: Path, records: list[dict]) -> Path:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_round_trip(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    responses = load_responses(_write(tmp_path, _records(tokenizer)), PROMPTS, tokenizer)
    assert sorted(responses) == [0, 1, 2]
    assert responses[1] == (
        TeacherResponse(1, 0, (30, 2), "stop"),
        TeacherResponse(1, 1, (31, 2), "stop"),
    )


def test_responses_to_prompts_that_were_left_out_are_not_missed(tmp_path: Path, tokenizer):
    path = _write(tmp_path, _records(tokenizer))
    kept = [PROMPTS[0], PROMPTS[2]]
    assert sorted(load_responses(path, kept, tokenizer, filtered=True)) == [0, 2]
    with pytest.raises(InputError, match="line 3: prompt_index must be in"):
        load_responses(path, kept, tokenizer)


def test_the_template_of_the_responses_is_named(tmp_path: Path, tokenizer):
    records = _records(tokenizer)
    records[0]["settings"]["chat_template_date"] = "2026-01-31"
    others = [Prompt(i, f"p{i}", (1, 6 + i), {}) for i in range(3)]
    expected = r"line 2: prompt 0 .*set what .*rollout.chat_template_date = '2026-01-31'"
    with pytest.raises(InputError, match=expected):
        load_responses(_write(tmp_path, records), others, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.clear(), "is empty"),
        (lambda r: r.pop(0), "line 1: expected a header with format 'tropd-responses-1'"),
        (lambda r: r[0].update(tokenizer="0" * 16), "another tokenizer: expected fingerprint"),
        (lambda r: r[2].update(prompt_index=3), r"line 3: prompt_index must be in 0\.\.2, found 3"),
        (lambda r: r[2].update(prompt_index=True), "line 3: prompt_index must be in"),
        (lambda r: r[3].update(prompt_index=0), "line 4: prompt 0 is not the one"),
        (lambda r: r[3].pop("prompt_sha"), "line 4: prompt 2 is not the one"),
        (lambda r: r[1].update(token_ids=[]), "line 2: token_ids must be a list of ids"),
        (lambda r: r[1].update(token_ids=["a"]), "line 2: token_ids must be a list of ids"),
        (lambda r: r[1].update(token_ids=[259]), r"line 2: token_ids must be in 0\.\.258"),
        (lambda r: r[1].update(finish_reason="abort"), 'line 2: expected an integer "sample"'),
        (lambda r: r[1].pop("sample"), 'line 2: expected an integer "sample"'),
        (
            lambda r: r.__delitem__(slice(2, None, 3)),
            "no response to 1 of the 3 prompts.* prompt 1",
        ),
    ],
)
def test_bad_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, change: Callable, message: str
):
    records = _records(tokenizer)
    change(records)
    with pytest.raises(InputError, match=message):
        load_responses(_write(tmp_path, records), PROMPTS, tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": "llama"}',  # one line, without its end
        b'{"prompt": "a"}\n{"prompt": "b"}\n',
        b"\x00" * 40,
        b"[" * 200_000,
        b"weights\n" * 3,
    ],
    ids=["json", "prompts", "zeros", "deep", "text"],
)
def test_another_file_is_not_written_over(tmp_path: Path, content: bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is another file"):
        ResumableLines(path, {"format": "x", "settings": {}}, key=["prompt"])
    assert path.read_bytes() == content


def test_a_header_that_was_cut_off_is_written_again(tmp_path: Path):
    path, header = tmp_path / "out.jsonl", {"format": "x", "settings": {"seed": 1}}
    path.write_bytes(b'{"format": "x", "set')
    ResumableLines(path, header, key=["prompt"]).close()
    assert json.loads(path.read_text()) == header


def test_unreadable_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(InputError, match=r"responses file .*absent\.jsonl cannot be read"):
        load_responses(tmp_path / "absent.jsonl", PROMPTS, tokenizer)
    path = _write(tmp_path, _records(tokenizer))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="line 7: expected a JSON object"):
        load_responses(path, PROMPTS, tokenizer)
