"""The recipe of the quickstart's pair runs, on two tensor-parallel ranks, for a few steps."""

import json
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from tests.ranks import PRELOADED

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"


def test_recipe_trains_and_writes_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_engines: None
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_pair

    monkeypatch.setattr(
        make_pair,
        "RECIPES",
        {"student": replace(make_pair.RECIPES["student"], layers=1, steps=30, warmup_steps=5)},
    )
    monkeypatch.setattr(make_pair, "NUM_HELD_OUT", 8)
    forked = partial(multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(multiprocessing, "spawn", forked)  # of ranks that have done the imports
    set_forkserver_preload(PRELOADED)
    command = ["make_pair.py", "--out", str(tmp_path), "--tensor-parallel", "2"]
    monkeypatch.setattr(sys, "argv", command)
    make_pair.main()

    made = json.loads((tmp_path / "pair.json").read_text())["student"]
    assert made["steps"] == 30 and made["problems"] == 8
    losses = [line["loss"] for line in made["log"]]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.num_parameters() == made["parameters"]
    for name in ("tokenizer.json", "tokenizer.model"):
        committed = (EXAMPLE / "student" / name).read_bytes()
        assert (tmp_path / "student" / name).read_bytes() == committed
    for name in ("prompts.jsonl", "heldout.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert (EXAMPLE / name).read_text().splitlines()[: len(lines)] == lines
