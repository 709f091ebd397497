"""The text of each token of an example, for the report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.distill.examples import spell

TEXT = 3 * (
    "Natalia sold  48 clips \u2014 na\u00efve caf\u00e9,\n\n \u65e5\u672c\u8a9e "
    "\U0001f600\U0001f44d\U0001f3fd! "
)
MODELS = ("models/stories260K", "models/babyllama-tok105", "hf-meta/Qwen3-1.7B")


@pytest.fixture(params=["tiny", *MODELS])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of bytes, and real ones: with bytes as a last resort, of characters, of BPE."""
    if request.param == "tiny":
        return load_tokenizer(request.getfixturevalue("tiny_llama"))
    folder: Path = request.getfixturevalue("shared_data")
    return load_tokenizer(folder / request.param)


def whole(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def test_joined_the_pieces_are_the_text(tokenizer: Any) -> None:
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    pieces = spell(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == whole(tokenizer, ids)
    assert spell(tokenizer, []) == []


def test_pieces_are_what_each_token_adds(tokenizer: Any) -> None:
    ids = tokenizer.encode("Once upon a time,  there were 12 clips.\nThe end ")
    added, before = [], ""
    for end in range(1, len(ids) + 1):
        text = whole(tokenizer, ids[:end])
        added.append(text[len(before) :])
        before = text
    assert spell(tokenizer, ids) == added


def test_a_character_cut_in_two_comes_with_its_last_token(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer.encode("\u00e9a", add_special_tokens=False)
    assert spell(tokenizer, ids)[-3:] == ["", "\u00e9", "a"]
    assert spell(tokenizer, ids[:-2])[-1] == "\ufffd"
    assert "".join(spell(tokenizer, ids[:1] * 9 + ids[2:])).endswith("a")


def test_8096_tokens_are_spelled_at_once(tokenizer: Any) -> None:
    ids = (tokenizer.encode(TEXT) * 200)[:8096]
    began = time.process_time()
    assert len(spell(tokenizer, ids)) == 8096
    assert time.process_time() - began < 3, "decoding every prefix takes 15 s and more"
