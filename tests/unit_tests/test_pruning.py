"""Dropping layers: the rest is bit-equal, and transformers agrees with the hidden states."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.pruning import drop_layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("limit", [2**31, 40_000])
def test_equals_a_model_with_the_layers_deleted(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, limit: int
):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2} if family == "qwen2" else {}
    source = tiny_model(family, num_hidden_layers=4, tie_word_embeddings=family != "llama", **heads)
    drop_layers(source, tmp_path / "out", [1, 2], max_file_bytes=limit)
    expected = AutoModelForCausalLM.from_pretrained(source)
    del expected.model.layers[1:3]
    for number, layer in enumerate(expected.model.layers):
        layer.self_attn.layer_idx = number
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        logits = expected(tokens, use_cache=False).logits
        assert torch.equal(found(tokens, use_cache=False).logits, logits)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (limit == 40_000)
    assert len(HFFolder(tmp_path / "out").names) < len(HFFolder(source).names)
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_settings_of_single_layers_follow_them(tiny_model: Callable[..., Path], tmp_path: Path):
    source = tmp_path / "source"
    source.symlink_to(tiny_model("llama", num_hidden_layers=3))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config |= {"layer_types": ["a", "b", "c"], "max_window_layers": 2}
    (copy / "config.json").write_text(json.dumps(config))
    drop_layers(copy, tmp_path / "out", [0])
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["num_hidden_layers"], found["layer_types"]) == (2, ["b", "c"])
    assert found["max_window_layers"] == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"has the layers 0\.\.1, found 2"),
        ([-1], r"found -1"),
        ([0, 1], r"some, but not all, of the 2 layers to drop, found \[0, 1\]"),
        ([], "some, but not all"),
    ],
)
def test_bad_layers(tiny_llama: Path, tmp_path: Path, layers: list[int], message: str):
    with pytest.raises(InputError, match=message):
        drop_layers(tiny_llama, tmp_path / "out", layers)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(InputError, match="exists already"):
        drop_layers(tiny_llama, tmp_path, [1])
    with pytest.raises(InputError, match="does not exist"):
        drop_layers(tmp_path / "absent", tmp_path / "out", [1])
    assert list(tmp_path.iterdir()) == []
