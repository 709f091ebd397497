"""Sequences come back exactly from their one form and from older ones, or with the line."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.sequence import COLUMNS, SampleKey, TokenSequence, Writer
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences

ONE = TokenSequence.of_runs(
    SampleKey(3, 1, 2),
    (Writer.CONTEXT, (1, 2)),
    (Writer.STUDENT, (3, 4)),
    (Writer.CONTEXT, (5,)),
    (Writer.TEACHER, (6,)),
    (Writer.STUDENT, (7,)),
    logprobs=(-0.1, -1e-30, float("nan")),
    version=3,
    finish="length",
    fields={"answer": "4"},
).replace(
    weight_N=np.float32([0, 0, 1, 0.3, 0, 2, 1]),
    behaviour_logprobs_N=np.float32([np.nan, np.nan, -0.7, -3, np.nan, -1.1, -2]),
)
BEFORE = {
    "step": 3, "prompt_index": 1, "sample_index": 2, "prompt_ids": [1, 2], "prefix_ids": [6],
    "response_ids": [3, 4], "rollout_logprobs": [-0.1, -1e-30], "finish_reason": "length",
    "weights_version": 2,
}  # fmt: skip


def assert_same(found: TokenSequence, expected: TokenSequence) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert (found.key, found.finish, found.fields) == (
        expected.key,
        expected.finish,
        expected.fields,
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_round_trip(tmp_path: Path, count: int):
    path = tmp_path / "t.jsonl"
    path.write_bytes(dump_sequences([ONE] * count))
    found = read_sequences(path)
    assert len(found) == count
    for sequence in found:
        assert_same(sequence, ONE)


def test_samples_of_a_checkpoint_of_version_0_1_are_read(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(BEFORE)}\n" * 2)
    expected = TokenSequence.of_runs(
        SampleKey(3, 1, 2),
        (Writer.CONTEXT, (1, 2)),
        (Writer.TEACHER, (6,)),
        (Writer.STUDENT, (3, 4)),
        logprobs=(-0.1, -1e-30),
        version=2,
        finish="length",
    )
    for sequence in read_sequences(path):
        assert_same(sequence, expected)
    assert len(read_sequences(path)) == 2
    path.write_text(json.dumps(BEFORE | {"rollout_logprobs": [-0.1]}))
    with pytest.raises(InputError, match=r"line 1: .* of version 0\.1.*each of the student's 2"):
        read_sequences(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine_logprobs": [-0.1]}, "expected one of engine_logprobs per token, found 1 for 7"),
        ({"writers": [["context", 2], ["student", 3]]}, "writers cover 5 tokens, expected 7"),
        ({"writers": [["nobody", 7]]}, r"writers must be a list like \[\["),
        ({"writers": [["student", 7]]}, "must start with a token of"),
        ({"weights": [1] * 7}, "weight_N must be 0 for tokens of"),
        ({"sample": "1"}, "sample must be an integer, found '1'"),
        ({"ids": []}, "ids must be a list of ids, not empty"),
    ],
)
def test_bad_lines(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "t.jsonl"
    path.write_bytes(dump_sequences([ONE, ONE]))
    *first, last = path.read_text().splitlines()
    path.write_text("\n".join([*first, json.dumps(json.loads(last) | change)]))
    with pytest.raises(InputError, match=f"line 3: .*{message}"):
        read_sequences(path)


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"file of token sequences .* cannot be read"):
        read_sequences(tmp_path / "absent.jsonl")
    path = tmp_path / "t.jsonl"
    path.write_text('{"format": "tropd-rollouts-3"}\n')
    with pytest.raises(InputError, match=r"line 1: expected a header .*found 'tropd-rollouts-3'"):
        read_sequences(path)
