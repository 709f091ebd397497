"""Tokenizers: loading, identity of a pair, and what ends a response."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.data.tokenizers import (
    check_same_tokenizer,
    fingerprint,
    load_tokenizer,
    stop_token_ids,
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same tokenizer."""
    folders = tmp_path / "student", tmp_path / "teacher"
    for folder in folders:
        write_tiny_tokenizer(folder)
    return folders


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _swap(first: str, second: str) -> Callable[[dict], object]:
    def change(file: dict) -> None:
        vocab = file["model"]["vocab"]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    return change


def test_same_tokenizer(pair: tuple[Path, Path]):
    tokenizer = check_same_tokenizer(*pair)
    assert tokenizer.decode(tokenizer.encode("One two"), skip_special_tokens=True) == "One two"
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(pair[1]))


def test_padded_tables_do_not_matter(pair: tuple[Path, Path]):
    for folder, size in zip(pair, (259, 320), strict=True):
        (folder / "config.json").write_text(
            json.dumps({"model_type": "llama", "vocab_size": size, "hidden_size": 64})
        )
    check_same_tokenizer(*pair)


def test_differing_ids_are_named(pair: tuple[Path, Path]):
    before = fingerprint(load_tokenizer(pair[1]))
    vocab = load_tokenizer(pair[1]).get_vocab()
    _edit(pair[1] / "tokenizer.json", _swap("a", "b"))
    first, second = sorted((vocab["a"], vocab["b"]))
    with pytest.raises(
        InputError,
        match=f"2 ids differ: id {first}: student 'a', teacher 'b'; id {second}: student 'b'",
    ):
        check_same_tokenizer(*pair)
    with pytest.raises(InputError, match=r"Student and reference .* student 'a', reference 'b'"):
        check_same_tokenizer(*pair, other="reference")
    assert fingerprint(load_tokenizer(pair[1])) != before


def test_only_the_first_of_many_differences_are_named(pair: tuple[Path, Path]):
    def rename(file: dict) -> None:
        vocab = file["model"]["vocab"]
        file["model"]["vocab"] = {
            k if i < 200 else f"{k}{k}": v for i, (k, v) in enumerate(vocab.items())
        }

    _edit(pair[1] / "tokenizer.json", rename)
    with pytest.raises(InputError, match=r"59 ids differ: id 200: .*; id 204: .* and 54 more"):
        check_same_tokenizer(*pair)


def test_a_missing_id_is_named(pair: tuple[Path, Path]):
    tokenizer = load_tokenizer(pair[0])
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(pair[0])
    with pytest.raises(InputError, match="id 259: student '<think>', teacher 'nothing'"):
        check_same_tokenizer(*pair)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_differing_special_token(pair: tuple[Path, Path], name: str):
    _edit(pair[1] / "tokenizer_config.json", lambda c: c.update({f"{name}_token": "<unk>"}))
    with pytest.raises(InputError, match=f"agree on {name}_token_id, found .* and 0 '<unk>'"):
        check_same_tokenizer(*pair)


def test_unusable_folders(tmp_path: Path, pair: tuple[Path, Path]):
    with pytest.raises(InputError, match="found none"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no tokenizer: expected one of tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    (pair[0] / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(pair[0])


def test_stop_token_ids(pair: tuple[Path, Path]):
    assert stop_token_ids(pair[0]) == (2,)
    assert stop_token_ids(pair[0], (7, 2, 5)) == (2, 5, 7)
    (pair[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert stop_token_ids(pair[0]) == (2, 9)
    (pair[0] / "generation_config.json").write_text(json.dumps({"eos_token_id": 8}))
    assert stop_token_ids(pair[0], (4,)) == (2, 4, 8)


def test_unusable_stop_tokens(pair: tuple[Path, Path]):
    with pytest.raises(ConfigError, match=r"ids in 0\.\.258, found 259"):
        stop_token_ids(pair[0], (259,))
    _edit(pair[0] / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(InputError, match="Nothing ends a response"):
        stop_token_ids(pair[0])
    assert stop_token_ids(pair[0], (4,)) == (4,)
    (pair[0] / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        stop_token_ids(pair[0])


@pytest.mark.parametrize("name", ["stories260K-hd32", "babyllama-tok105-hd32"])
def test_real_sentencepiece_tokenizers(shared_data: Path, name: str):
    folder = shared_data / "models" / name
    tokenizer = check_same_tokenizer(folder, folder)
    text = "Once upon a time, there was a cat."
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert stop_token_ids(folder) == (2,)


def test_real_pair_that_does_not_match(shared_data: Path):
    models = shared_data / "models"
    with pytest.raises(InputError, match="ids differ: id 3: student"):
        check_same_tokenizer(models / "stories260K-hd32", models / "babyllama-tok105-hd32")


def test_real_sentencepiece_model_alone_is_enough(shared_data: Path, tmp_path: Path):
    source = shared_data / "models" / "stories260K-hd32"
    for name in ("tokenizer.model", "config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    check_same_tokenizer(source, tmp_path)
