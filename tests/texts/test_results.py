"""The committed results of benchmarks are complete, and the texts show their numbers."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit_tests.test_benchmark_loss import KEYS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("step-*.json"))
LOSSES = sorted((BENCHMARKS / "results").glob("loss-[!t]*.json"))
SOAKS = sorted((BENCHMARKS / "results").glob("soak-*.json"))


def module(name: str) -> ModuleType:
    """A script of the folder as a module."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return __import__(name)


@pytest.fixture(scope="module")
def step() -> ModuleType:
    """``benchmarks/step.py`` as a module."""
    return module("step")


@pytest.fixture(scope="module")
def loss() -> ModuleType:
    """``benchmarks/loss.py`` as a module."""
    return module("loss")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_of_the_steps_is_complete(step: ModuleType, path: Path):
    result = json.loads(path.read_text())
    assert result.keys() >= {
        "hardware",
        "command",
        "commit",
        "date",
        "settings",
        "versions",
        "rows",
        "ratio_to_trl",
        "loss_alone",
        "aims",
        "seconds",
        "trl",
    }
    assert result["versions"].keys() == {"ours", "TRL"}
    rows = {row["name"]: row for row in result["rows"]}
    assert {"ours, TP 1", "TRL"} <= rows.keys()
    for row in rows.values():
        assert row["steps"] >= 3 and row["tokens_per_step"] > 0
        assert row["seconds"].keys() - {"total"} == row["share"].keys()
        assert sum(row["share"].values()) == pytest.approx(1, abs=0.05)
    assert set(step.PHASES) <= rows["ours, TP 1"]["seconds"].keys()
    ratio = rows["ours, TP 1"]["tokens_per_second"] / rows["TRL"]["tokens_per_second"]
    assert result["ratio_to_trl"]["ours, TP 1"] == pytest.approx(ratio, abs=1e-2)
    assert result["aims"] == step.aims(result)
    assert not re.search(r'["\s]/\w', path.read_text())  # no absolute path


def test_the_conversion_result_is_what_the_text_says():
    """At least 8 GB in less than 2 GB of private memory, and files that came back equal."""
    (path,) = (BENCHMARKS / "results").glob("convert-*.json")
    result = json.loads(path.read_text())
    assert result["checkpoint_bytes"] >= 8e9
    assert result["limit_of_private_memory_bytes"] <= 2e9
    for phases in result["rounds"]:
        for phase in ("to_megatron", "to_hf"):
            assert phases[phase]["data_gb"] <= 2
    assert result["files_equal_after_there_and_back"]
    best = result["best_seconds"]
    assert result["time_in_copies"]["to_hf"] == pytest.approx(
        best["to_hf"] / best["copy"], abs=0.01
    )
    assert not re.search(r'["\s]/\w', path.read_text())  # no absolute path


@pytest.mark.parametrize("path", SOAKS, ids=lambda path: path.stem)
def test_a_soak_met_a_fault_every_so_many_steps(path: Path):
    result = json.loads(path.read_text())
    steps, every = (
        int(re.search(rf"--{name} (\d+)", result["command"])[1]) for name in ("steps", "every")
    )
    assert result["steps"] == steps and not result["modified"]
    assert len(result["each"]) == sum(result["faults"].values()) == steps // every - 1
    assert [(each["step"] - 1) // every for each in result["each"]] == list(
        range(len(result["each"]))
    )
    assert sum(each["steps_done_again"] for each in result["each"]) == result["steps_done_again"]
    assert result["difference"].startswith("none, bit for bit")
    assert not re.search(r'["\s]/\w', path.read_text())  # no absolute path


def test_parallelism_shows_what_the_dealing_saves():
    (path,) = (BENCHMARKS / "results").glob("balance-*.json")
    result = json.loads(path.read_text())
    page = (BENCHMARKS.parent / "docs" / "parallelism.md").read_text()
    assert module("balance").table(result) in page, "python benchmarks/balance.py --table"
    rows = {(r["lengths"], r["replicas"], r["dealt"]): r for r in result["counted"]}
    for (lengths, replicas, dealt), row in rows.items():
        if dealt == "greedy":
            found = rows[lengths, replicas, "differencing"]["time_over_in_turns"]
            assert row["time_over_in_turns"] <= 1.02 * found, "the simpler way, unless it is worse"


def test_the_placement_result_is_what_the_text_says():
    """Of an earlier version, which could also broadcast weights; the tables have what is left."""
    (path,) = (BENCHMARKS / "results").glob("placement-*.json")
    result = json.loads(path.read_text())
    text = (BENCHMARKS.parent / "docs" / "serving.md").read_text()
    rows = [row for row in result["steps"] if "direct" not in row["name"]]
    assert [row["name"] for row in rows] == ["colocated", "servers, folder"]
    for row in rows:
        assert f"| {row['name']} | {row['total_over_colocated']:.2f} |" in text
    seconds = result["hand_over"]["median_seconds"]["folder"]
    numbers = " | ".join(f"{seconds[name]:.1f} s" for name in ("trainer", "samples"))
    assert f"| folder | {numbers} |" in text
    assert f"{result['hand_over']['weights_mib']:.0f} MiB" in text
    assert f"load of {result['hardware']['load_average_before']:.0f}" in text
    assert not re.search(r'["\s]/\w', path.read_text())  # no absolute path


def test_the_traffic_of_the_losses_is_what_the_text_says():
    rows = json.loads((BENCHMARKS / "results" / "traffic-counted.json").read_text())["rows"]
    committed = {(row["name"], row["tensor_parallel"]): row for row in rows}
    text = (BENCHMARKS.parent / "docs" / "losses.md").read_text()
    part = text[text.index("benchmarks/loss_traffic.py") :]
    for name in {name for name, _ in committed}:
        cells = re.search(rf"^\| {re.escape(name)} \| (.+) \|$", part, re.MULTILINE)[1].split(" | ")
        one, eight = (committed[name, size] for size in (1, 8))
        moved = one["bytes_of_a_token_over_v"]
        expected = [moved[key] for key in ("kernels", "products", "others", "all")]
        expected.append(eight["bytes_of_a_token_over_v"]["all"])
        assert cells[:5] == [f"{value:.0f}" for value in expected], name
        assert cells[5] == " + ".join(f"{x['words']:.0f}" for x in eight["collectives"]), name


@pytest.mark.parametrize("path", LOSSES, ids=lambda path: path.stem)
def test_a_result_of_the_losses_is_complete(loss: ModuleType, path: Path):
    result = json.loads(path.read_text())
    keys = ("hardware", "command", "commit", "date", "settings", "versions", "aims", "seconds")
    assert result.keys() >= set(keys)
    rows = result["rows"]
    options = loss.parse_arguments([])
    wanted = [
        (case.name, size.tp, size.tokens)
        for size in loss.sizes(options)
        for case in loss.cases_of(size, options)
    ]
    assert [(row["name"], row["tp"], row["tokens"]) for row in rows] == wanted
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row["grad_error"] < 1e-5 for row in rows if row["source"] == "ours")
    assert result["aims"] == loss.aims(rows)
    assert set(result["versions"]["peers"]) == set(module("loss_peers").PACKAGES)
    assert not re.search(r'["\s]/\w', path.read_text())  # no absolute path


def test_the_page_of_the_study_has_the_tables_and_plots_of_its_lines():
    study, plots = module("study"), module("study_plots")
    (path,) = (BENCHMARKS / "results").glob("study-*.jsonl")
    lines = study.Results(path).read()
    page = BENCHMARKS.parent / "docs" / "study.md"
    assert study.with_tables(page.read_text(), lines) == page.read_text()
    made = re.search(r"^\d+ of about \d+ runs", page.read_text(), re.M)
    texts = "".join((page.parent / name).read_text() for name in ("results.md", "support.md"))
    texts = " ".join(texts.split())
    assert made and set(re.findall(r"\d+ of about \d+", texts)) == {made[0].removesuffix(" runs")}
    for name, text in plots.drawings(lines).items():
        assert (page.parent / name).read_text() == text


def test_the_table_of_memory_options_is_that_of_its_run():
    (path,) = (BENCHMARKS / "results").glob("memory-options-*.json")
    table = module("memory_options").table(json.loads(path.read_text())["rows"])
    assert table in (BENCHMARKS.parent / "docs" / "parallelism.md").read_text()


def test_the_table_of_two_teachers_is_that_of_its_runs():
    (path,) = (BENCHMARKS / "results").glob("two-teachers-*.json")
    runs = json.loads(path.read_text())["runs"]
    text = (BENCHMARKS.parent / "docs" / "teachers.md").read_text()
    assert module("two_teachers").table(runs) in text
    for both, *alone in zip(*runs.values(), strict=True):
        mean = [sum(run["after"].values()) / 2 for run in (both, *alone)]
        assert mean[0] > max(mean[1:]), "over both tasks; on the mirrored one it is level"
