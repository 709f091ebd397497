"""Engines are made from the same settings wherever they are made."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.config import config_from_dict
from megatron_tropd.config.run_defaults import add_engine_options
from megatron_tropd.distill import engines

INPUTS = SimpleNamespace(max_model_len=64, vocab_size=90)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the engines that were made."""
    settings: list[dict[str, Any]] = []
    monkeypatch.setattr(engines, "RolloutEngine", lambda _, **given: settings.append(given))
    return settings


def _config(**rollout: Any) -> Any:
    return config_from_dict(
        {
            "model": {"student": "s", "teacher": "t"},
            "rollout": {"prompts": "p", "max_new_tokens": 4, **rollout},
            "train": {"steps": 5},
            "run": {"dir": "r"},
        }
    )


def _make(config: Any, **given: Any) -> None:
    engines.make_engine(config, INPUTS, Path("m"), log_file=Path("log"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alone", "asked", "share"),
    [(False, 0.3, 0.3), (True, 0.3, engines.MEMORY_ALONE), (True, 0.9, 0.9)],
)
def test_an_engine_that_is_alone_takes_most_of_its_gpus(
    made: list[dict[str, Any]],
    alone: bool,
    asked: float,
    share: float,
) -> None:
    _make(_config(engine_gpu_share=asked, engine_cpu_kv_gib=2.0), alone=alone)
    assert (made[0]["gpu_share"], made[0]["cpu_kv_gib"]) == (share, 2.0)


def test_limits_of_the_batch_reach_the_engine_of_a_run_and_of_a_tool(
    made: list[dict[str, Any]],
) -> None:
    _make(_config(max_num_seqs=64, max_num_batched_tokens=2048))
    _make(_config())
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    add_engine_options(parser)
    words = ["--out", "o/x.jsonl", "--max-num-seqs", "64", "--max-num-batched-tokens", "2048"]
    options = parser.parse_args(words)
    engines.tool_engine(options, Path("m"), max_model_len=3)
    limits = [(e["max_num_seqs"], e["max_num_batched_tokens"]) for e in made]
    assert limits == [(64, 2048), (None, None), (64, 2048)]
    assert made[2]["log_file"] == Path("o/x.jsonl.engine.log")
