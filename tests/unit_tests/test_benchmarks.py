"""The benchmark sums up correctly, and the committed results are complete."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tropd.config import load_config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


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
