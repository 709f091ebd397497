"""The benchmark sums up correctly, and the committed results are complete."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tropd.config import load_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("step-*.json"))
SOAKS = sorted((BENCHMARKS / "results").glob("soak-*.json"))


@pytest.fixture(scope="module")
def step() -> ModuleType:
    """``benchmarks/step.py`` as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_step", BENCHMARKS / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _record(scale: float, **more: float) -> dict[str, float]:
    phases = {"rollout": 5.0, "teacher": 1.0, "student": 2.0, "optimizer": 0.5, **more}
    return {k: v * scale for k, v in (phases | {"total": 10.0}).items()} | {"tokens": 1000}


def test_without_git_nobody_knows_the_commit(step: ModuleType):
    """As in an unpacked archive; the benchmark runs all the same."""
    assert step.commit() == {"commit": None, "modified": None}


@pytest.mark.needs("git")
def test_a_folder_that_is_no_checkout_has_no_commit(step: ModuleType, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "REPOSITORY", tmp_path)
    assert step.commit() == {"commit": None, "modified": None}


def test_summary_is_the_median_of_all_rounds(step: ModuleType):
    row = step.summarise("x", [[_record(1), _record(2)], [_record(3)]])
    assert row["steps"] == 3 and row["tokens_per_second"] == 50.0
    assert row["seconds"] == {
        "rollout": 10.0,
        "teacher": 2.0,
        "student": 4.0,
        "optimizer": 1.0,
        "other": 3.0,
        "total": 20.0,
    }
    assert sum(row["share"].values()) == pytest.approx(1)
    assert row["tokens_per_second_of_rounds"] == [75.0, 33.3]


def test_aims_compare_the_right_way(step: ModuleType):
    ours = step.summarise("ours, TP 1", [[_record(1, sync=0.1)]])
    trl = step.summarise("TRL", [[_record(4)]])
    result = {"rows": [ours, trl], **step.comparisons([ours, trl]), "loss_alone": {"seconds": 0.5}}
    aims = step.aims(result)
    assert result["ratio_to_trl"] == {"ours, TP 1": 4.0}
    assert {name: (aim["value"], aim["met"]) for name, aim in aims.items()} == {
        "tokens_per_second_over_trl": (4.0, True),
        "weight_sync_share": (0.01, True),
        "loss_and_teacher_over_student": (1.0, True),
    }
    assert "ours, TP 1" in step.table(result | {"aims": aims})


def test_config_of_our_side_loads(step: ModuleType, tmp_path: Path):
    path = tmp_path / "step.toml"
    path.write_text(step.our_config(step.parse_arguments([]), tmp_path / "run", 2, 1))
    config = load_config(path)
    assert config.parallel.tensor == config.rollout.num_engines == 2
    assert config.train.adam_betas == (0.9, 0.95) and config.model.dtype == "float32"


def test_shown_command_hides_folders_of_the_machine(step: ModuleType, tmp_path: Path):
    command = step.shown_command(["step.py", "--student", str(tmp_path / "pair")])
    assert command == "python benchmarks/step.py --student pair"


def test_trl_is_pinned_by_version_alone():
    lines = (BENCHMARKS / "requirements-trl.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert {"trl", "torch", "transformers"} <= names


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_result_is_complete(step: ModuleType, path: Path):
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
