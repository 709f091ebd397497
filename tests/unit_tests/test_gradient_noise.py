"""The arithmetic of the gradient-noise benchmark; what it measures takes minutes and a pair."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "gradient_noise", BENCHMARKS / "gradient_noise.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_noise_is_the_trace_over_the_squared_mean_without_its_bias(benchmark):
    draw = torch.Generator().manual_seed(0)
    mean, deviation = torch.full((50,), 2.0, dtype=torch.float64), 3.0
    gradients = [
        mean + deviation * torch.randn(50, generator=draw, dtype=torch.float64) for _ in range(2000)
    ]
    measured = benchmark.noise(gradients)
    assert measured["trace"] == pytest.approx(50 * 9.0, rel=0.02)
    assert measured["noise_to_signal"] == pytest.approx(9.0 / 4.0, rel=0.05)


def test_equal_gradients_have_no_noise(benchmark):
    assert benchmark.noise([torch.ones(3, dtype=torch.float64)] * 4)["noise_to_signal"] == 0


def test_committed_result_shows_what_exactness_removes(benchmark):
    (path,) = (BENCHMARKS / "results").glob("gradient-noise-*.json")
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == benchmark.METHODS.keys()
    draws = {name: row["draws"]["noise_to_signal"] for name, row in rows.items()}
    assert draws["TrOPD, bernoulli"] > draws["TrOPD, expected"] > draws["TrOPD, exact"] == 0
    assert draws["OPD"] > draws["reverse KL (OPD, exact)"] == 0
    assert not re.search(r'["\s=]/\w', path.read_text())  # no absolute path
    assert "| OPD |" in benchmark.table(list(rows.values()))
