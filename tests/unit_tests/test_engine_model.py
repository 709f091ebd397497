"""What an engine is given and what it is spared, without an engine."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.config import RolloutConfig
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.rollout.engines.child import _is_refusal
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.engine_model import (
    check_engine,
    engine_tensors,
    first_rows,
    remove_engine_folder,
    write_engine_folder,
)

VOCAB = 259


def test_an_engine_sees_nothing_but_config_and_weights(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("mistral", seed=31)
    for name in ("params.json", "hf_quant_config.json", "consolidated.safetensors"):
        (folder / name).write_text("{}")
    source, place = HFFolder(folder), tmp_path / "engine.model"
    place.mkdir()
    (place / "from_before.json").write_text("{}")
    config = write_engine_folder(source, place, VOCAB)
    assert {path.name for path in place.iterdir()} == {
        *("config.json", "model.safetensors", "model.safetensors.index.json")
    }
    assert json.loads((place / "config.json").read_text()) == config
    assert model_shape(config) == model_shape(source.config)
    assert (place / "model.safetensors").samefile(folder / "model.safetensors")
    remove_engine_folder(place)
    assert not place.exists() and (folder / "model.safetensors").exists()


def test_an_engine_with_fewer_columns_gets_no_weights_to_read(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = write_engine_folder(HFFolder(tiny_llama), tmp_path / "x", 200)
    assert config["vocab_size"] == 200
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["config.json"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_columns_are_what_the_trainer_will_send(
    tiny_model: Callable[..., Path], tied: bool
) -> None:
    folder = tiny_model("llama", tie_word_embeddings=tied)
    whole = load_file(folder / "model.safetensors")
    rows = dict(first_rows(folder, 200))
    shapes = {name: tuple(tensor.shape) for name, tensor in rows.items()}
    assert shapes == engine_tensors(HFFolder(folder).config, 200)
    head = whole["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(rows["lm_head.weight"], head[:200])
    assert torch.equal(rows["model.norm.weight"], whole["model.norm.weight"])


SLIDING = {"sliding_window": 10, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("family", "change", "settings", "named"),
    [
        ("llama", {"head_dim": 16}, {}, r"heads of size 16; vLLM on CPU runs sizes \[32"),
        ("llama", {"head_dim": 16}, {"cuda": True}, None),
        ("qwen2", {"head_dim": 64}, {}, "4 attention heads of size 64 and hidden_size 64"),
        ("qwen3", SLIDING | {"max_window_layers": 1}, {}, "in some layers only"),
        ("qwen3", SLIDING | {"max_window_layers": 0}, {}, None),
        ("qwen3", SLIDING | {"max_window_layers": 2}, {}, None),
        ("llama", {}, {"tensor_parallel": 3, "cuda": True}, "must divide the attention heads"),
        ("llama", {}, {"tensor_parallel": 4, "cuda": True}, None),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
            {"tensor_parallel": 2, "cuda": True},
            "key/value heads.*found 3",
        ),
        ("llama", {"intermediate_size": 97}, {"tensor_parallel": 2, "cuda": True}, "found 97"),
    ],
)
def test_models_that_vllm_does_not_run_are_refused_by_name(
    family: str, change: dict, settings: dict, named: str | None
) -> None:
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = {
        "model_type": family,
        "architectures": [f"{names[family]}ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
    }
    config |= {"hidden_size": 128} if family == "qwen2" and "head_dim" not in change else {}
    check = {"cuda": False, "who": "student"} | settings
    if named is None:
        check_engine(config | change, 128, **check)
        return
    with pytest.raises((InputError, ConfigError), match=named):
        check_engine(config | change, 128, **check)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (AssertionError("Sliding window for some but all layers"), False),
        (ValueError("Free memory on device cuda:0 (1.0/80.0 GiB) on startup is less"), True),
        (RuntimeError("CUDA error: device lost"), True),
        (NotImplementedError("Encoder only"), False),
        (ModuleNotFoundError("No module named 'flashinfer'"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    assert _is_refusal(error) is not again


def gap(
    value: float | None,
    dtype: torch.dtype,
    limit: float | None = None,
    *,
    step: int = 3,
    version: int = 3,
    tokens: int = 5,
    looks: int = 1,
    dropout: bool = False,
) -> None:
    """Look at the gap of a step whose samples are of version ``version``."""
    limit = RolloutConfig(prompts="p", max_new_tokens=4, max_engine_gap=limit).max_engine_gap
    compared = EngineGap(limit, dtype, advice="Compare the files.", dropout=dropout)
    sequences: Any = [SimpleNamespace(oldest_version=version)]
    for gap_mean in (*[1e-6] * (looks - 1), value):
        metrics = {"engine_gap_mean": gap_mean, "engine_gap_max": 9.0, "tokens_student": tokens}
        compared.check(metrics, sequences, step)


def test_a_run_whose_engine_computes_another_model_stops() -> None:
    gap(1e-5, torch.float32)
    gap(0.03, torch.bfloat16)
    for value, dtype in ((0.01, torch.float32), (0.74, torch.bfloat16), (None, torch.float32)):
        with pytest.raises(TrainingError, match=r"do not compute the same model.*Compare"):
            gap(value, dtype)
    with pytest.raises(TrainingError, match=r"0\.74 nats.*expected at most 0\.001 in float32"):
        gap(0.74, torch.float32)


def test_a_gap_is_looked_at_where_it_should_be_small() -> None:
    gap(0.74, torch.float32, limit=1.0)
    gap(0.74, torch.float32, limit=0.0)  # never
    gap(0.74, torch.float32, version=2)  # samples of older weights
    gap(0.74, torch.float32, looks=2)  # the first one was good
    gap(None, torch.float32, tokens=0)
    gap(0.74, torch.float32, dropout=True)  # of adapters that are no longer zero
    with pytest.raises(TrainingError, match=r"at most 0\.001"):
        gap(0.74, torch.float32, step=0, version=0, dropout=True)
    with pytest.raises(TrainingError, match=r"at most 0\.5"):
        gap(0.74, torch.float32, limit=0.5)
    with pytest.raises(ConfigError, match="max_engine_gap must be at least 0"):
        gap(0.1, torch.float32, limit=-1.0)


def test_a_refusal_of_vllm_is_no_death_of_the_engine(tmp_path: Path) -> None:
    engine = object.__new__(RolloutEngine)
    engine._log_file = tmp_path / "log"
    engine._log_file.write_text("why\n")
    engine._waiting_for, engine._reading, engine._early = "start", threading.Lock(), None
    engine._child = SimpleNamespace(keep_output=lambda path: None)
    engine._connection = SimpleNamespace(recv=lambda: ("refused", "AssertionError: windows"))
    with pytest.raises(ConfigError, match=r"(?s)does not start.*AssertionError: windows.*why"):
        engine._receive()


@pytest.mark.timeout(60)
def test_a_stream_does_not_wait_for_a_child_that_waits_for_it() -> None:
    """Both have more to send than their pipe holds, and the child sends without reading."""
    mine, childs = multiprocessing.Pipe()
    engine, large, count = object.__new__(RolloutEngine), b"x" * 2**20, 8
    engine._connection, engine._waiting_for = mine, "stream"
    engine._reading, engine._early = threading.Lock(), None
    engine._be_ready = engine._check_request = lambda *_: None
    engine._settings, engine._log_file = SimpleNamespace(draft_folder=None), None
    engine._child = SimpleNamespace(keep_output=lambda path: None)
    engine._send = lambda *_: None

    def child() -> None:
        for _ in range(count):
            childs.send(("ok", large))
        while childs.recv() is not None:
            pass
        childs.send(("ok", None))

    threading.Thread(target=child, daemon=True).start()
    with engine.stream(None):
        for index in range(count):
            engine.add_to_stream(index, large)
        for _ in range(count):
            assert engine.next_of_stream(30.0) == large
