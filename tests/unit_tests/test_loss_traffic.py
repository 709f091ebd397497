"""What the losses move on a GPU is counted as documented."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.machine import torch_as_it_was

REPOSITORY = Path(__file__).resolve().parents[2]
EXACT = "exact TrOPD, whole vocabulary"


@pytest.fixture(scope="module")
def traffic():
    """``benchmarks/loss_traffic.py`` as a module."""
    pytest.importorskip("triton")
    path = REPOSITORY / "benchmarks" / "loss_traffic.py"
    spec = importlib.util.spec_from_file_location("loss_traffic", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_traffic"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(traffic):
    """(name, tensor-parallel size) -> row."""
    rows = json.loads(traffic.RESULT.read_text())["rows"]
    return {(row["name"], row["tensor_parallel"]): row for row in rows}


@pytest.mark.parametrize("size", [1, 8])
def test_the_count_is_the_committed_one(traffic, committed, size, monkeypatch):
    chosen = (EXACT,) if size == 1 else ("exact TrOPD, top-64 forward KL",)
    monkeypatch.setattr(traffic, "ROWS", {name: traffic.ROWS[name] for name in chosen})
    with torch_as_it_was():
        rows = traffic.rows_of(size)
    for row in rows:
        assert row == committed[row["name"], size], "python benchmarks/loss_traffic.py --write"


def test_every_logit_is_read_once_per_pass(committed):
    """Two models in float32: once for the normalisers, once for the sums, once for the gradient."""
    moved = committed[EXACT, 1]["bytes_of_a_token_over_v"]
    assert moved["kernels"] == pytest.approx(8 + 8 + 8 + 2, abs=0.05)
    assert moved["products"] == pytest.approx(4 + 4 + 2 + 2)
    assert moved["others"] < 0.05
