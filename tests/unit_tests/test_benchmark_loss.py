"""The loss benchmark: its meters read what they should, its rows have their keys and sum up."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("loss-*.json"))
KEYS = {
    "name",
    "tp",
    "tokens",
    "vocab",
    "hidden",
    "dtype",
    "seconds",
    "ratio",
    "peak_u",
    "peak_mib",
    "collectives_forward",
    "collectives_backward",
    "grad_error",
}


def _module(name: str) -> ModuleType:
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return __import__(name)


@pytest.fixture(scope="module")
def loss() -> ModuleType:
    """``benchmarks/loss.py`` as a module."""
    return _module("loss")


def _answer(**changes: object) -> dict:
    answer = {
        "seconds": [2.0, 3.0, 10.0],
        "products": [2.0, 2.0, 5.0],
        "peak": 3 * 2**20,
        "collectives": {"forward": {"allgather": 2, "allreduce": 3}, "backward": {"allreduce": 1}},
        "grad_error": 1e-6,
    }
    return answer | changes


def _row(loss: ModuleType, name: str, **changes: object) -> dict:
    case = loss.Case(name, "ours", "jsd", "text")
    size = loss.Size(2, 1024, 2048, 64, "float32")
    return loss.row_of(case, size, _answer()) | changes


def test_row_has_medians_and_counts(loss: ModuleType):
    row = _row(loss, "x")
    assert row.keys() >= KEYS
    assert (row["seconds"], row["products_seconds"], row["ratio"]) == (3.0, 2.0, 1.5)
    assert row["ratio_of_rounds"] == [1.0, 1.5, 2.0]
    # u = 1024 tokens x 1024 columns of a rank x 4 bytes = 4 MiB.
    assert (row["peak_mib"], row["peak_u"]) == (3.0, 0.75)
    assert (row["collectives_forward"], row["collectives_backward"]) == (5, 1)


def test_row_that_cannot_run_keeps_its_place_and_says_why(loss: ModuleType):
    case = loss.Case("peer", "trl", "jsd", "text")
    size = loss.Size(1, 8, 16, 4, "float32")
    row = loss.row_of(case, size, {"note": "RuntimeError: 0 active drivers"})
    numbers = ("seconds", "ratio", "peak_u", "peak_mib", "collectives_forward", "grad_error")
    assert row.keys() >= KEYS and all(row[key] is None for key in numbers)
    assert "0 active drivers" in loss.table([row])


def test_wrong_gradient_is_said_beside_the_numbers(loss: ModuleType):
    case = loss.Case("peer", "trl", "jsd", "text")
    row = loss.row_of(case, loss.Size(1, 8, 16, 4, "float32"), _answer(grad_error=1.0))
    assert row["note"] == "gradient differs from the definition by 100%" and row["ratio"] == 1.5
    assert loss.line(row).endswith(row["note"]) and "1.50" in loss.line(row)


def test_note_is_the_error_without_folders(loss: ModuleType):
    log = "Traceback\n[rank0]: OSError: no /home/someone/x/libfoo.so\n[rank0]: more\nwarning"
    assert loss.last_error(["", log]) == "OSError: no libfoo.so"
    assert loss.last_error(["last words"]) == "last words"


def test_aims_take_the_worst_exact_method_from_hidden_states(loss: ModuleType):
    name = "ours hidden exact {}"
    rows = [
        _row(loss, name.format("jsd"), ratio=1.2, peak_mib=64.25),
        _row(loss, name.format("jsd"), tokens=4096, ratio=9.0, peak_mib=71.0, peak_u=0.14),
        _row(loss, name.format("tropd"), ratio=1.3),
        _row(loss, name.format("tropd, metrics"), ratio=2.0),
        _row(loss, "ours logits exact tropd", ratio=3.0),
        _row(loss, name.format("forward_kl"), ratio=None, peak_mib=None),
    ]
    found = {key: (aim["value"], aim["met"]) for key, aim in loss.aims(rows).items()}
    # Hidden states: 0.25 MiB at 1024 tokens, 1 MiB at 4096.
    assert found == {
        "exact_hidden_ratio": (1.3, False),
        "exact_hidden_peak_u": (0.14, True),
        "exact_hidden_growth": (round(70 / 64, 3), True),
    }
    assert "exact_hidden_ratio: 1.3 (aim <= 1.25: not met)" in loss.table(rows)
    assert all(aim["met"] is False for aim in loss.aims([]).values())


def test_sizes_of_the_targets_are_run_by_default(loss: ModuleType):
    sizes = loss.sizes(loss.parse_arguments([]))
    assert [(s.tp, s.tokens, s.vocab, s.hidden, s.large) for s in sizes] == [
        (1, 1024, 32768, 512, False),
        (2, 1024, 65536, 512, False),
        (2, 4096, 65536, 512, True),
    ]
    assert {s.unit_mib for s in sizes} == {128.0, 512.0}
    chosen = loss.parse_arguments(["--tokens", "64", "--vocab", "512", "--tp", "2", "--quick"])
    assert [(s.tokens, s.columns, s.hidden) for s in loss.sizes(chosen)] == [(64, 256, 32)]
    both = loss.parse_arguments(["--tp", "1", "--tokens", "8", "--dtype", "float32", "bfloat16"])
    assert [s.dtype for s in loss.sizes(both)] == ["float32", "bfloat16"]
    with pytest.raises(SystemExit):
        loss.parse_arguments(["--vocab", "513"])


def test_names_say_entrance_and_exactness(loss: ModuleType):
    cases = {case.name: case for case in loss.all_cases()}
    definitions = _module("loss_cases").DIVERGENCES
    for name, case in cases.items():
        assert ("hidden" in name or "exact" in name) <= (case.source == "ours")
        assert case.computes and (case.divergence in definitions or name == loss.PRODUCTS)
    for method in loss.EXACT:
        assert cases[f"ours hidden exact {method}"].large
    options = loss.parse_arguments(["--rows", "jsd", "--no-peers"])
    one, two, large = (
        {case.name for case in loss.cases_of(size, options)} for size in loss.sizes(options)
    )
    assert one == {loss.PRODUCTS, "ours hidden exact jsd", "dense jsd"}
    assert two == large == one - {"dense jsd"}


def test_peers_are_pinned_by_version_alone():
    lines = (BENCHMARKS / "requirements-loss-peers.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+", line) for line in lines)
    assert set(_module("loss_peers").PACKAGES) <= {line.partition("==")[0] for line in lines}


@pytest.mark.parametrize("poll", [False, True])
def test_meter_sees_a_buffer_that_is_gone_again(poll: bool):
    # In a process of its own: malloc's settings stay changed.
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import time, torch, loss_worker
loss_worker.set_malloc(exact=True)
kept = []
def call():
    kept.append(torch.ones(16 << 18))
    small = [torch.ones(1 << 18) for _ in range(32)]
    del small
    gone = torch.ones(48 << 18); time.sleep(0.05); del gone
torch.ones(64 << 18)
print(loss_worker.peak_rise(call, poll={poll}), loss_worker.peak_rise(lambda: None, poll={poll}))
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    seen, nothing = (int(part) / 2**20 for part in answer.split())
    assert seen == pytest.approx(16 + 48, abs=2.5) and abs(nothing) < 1


def _check_worker(group: dist.ProcessGroup) -> None:
    worker, cases = _module("loss_worker"), _module("loss_cases")
    inputs = cases.make_inputs(48, 64, 16, torch.float32, group)
    case = cases.Case("dense reverse_kl", "dense", "reverse_kl", "text")
    row = cases.build(case, inputs)

    worker.gradient_error(case, group, torch.float32)
    peak, counts = worker.measure_call(row, inputs)
    assert peak < 32 * 2**20  # what the process itself does meanwhile is in it
    assert counts == {"forward": {"allgather": 2}, "backward": {"allreduce": 1}}

    assert worker.gradient_error(case, group, torch.float32) < 1e-5
    worker.build = lambda *arguments: _scaled(cases.build(*arguments), 2.0)
    assert worker.gradient_error(case, group, torch.float32) == pytest.approx(1.0, abs=1e-4)

    logits_Tv = (inputs.hidden_TH @ inputs.weight_vH.t()).detach()
    for tile in ((48, 64), (32, 24)):
        products = worker.Products(inputs, tile)
        products()
        products()
        torch.testing.assert_close(products.grad_TH, logits_Tv @ inputs.weight_vH)
        torch.testing.assert_close(products.grad_vH, logits_Tv.t() @ inputs.hidden_TH)
    assert worker.fastest_tile(inputs) in worker.tiles(48, 64)


def _scaled(row: object, factor: float) -> object:
    return lambda: factor * row()


def test_worker_counts_collectives_and_catches_a_wrong_gradient():
    run_on_ranks(2, _check_worker)


def test_json_is_all_that_is_printed(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "loss.py"), "--quick", "--no-peers", "--json"]
    command += ["--tp", "2", "--rows", "^ours hidden exact reverse_kl$"]
    command += ["--write", str(tmp_path / "result.json")]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    rows = json.loads(answer.stdout)
    assert [row["name"] for row in rows] == ["matrix products", "ours hidden exact reverse_kl"]
    assert all(row.keys() >= KEYS and row["note"] is None for row in rows)
    ours = rows[1]
    assert ours["grad_error"] < 1e-5 and ours["ratio"] > 0 and 0 <= ours["peak_mib"] < 8
    # One chunk: at most two collectives, and the sum of the hidden states' gradient.
    assert 1 <= ours["collectives_forward"] <= 2 and ours["collectives_backward"] == 1
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["rows"] == rows and written["versions"].keys() == {"ours"}
