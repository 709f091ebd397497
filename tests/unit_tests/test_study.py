"""The study's runs are complete configs, and its tables say what its lines say."""

import sys
from pathlib import Path

import pytest

from megatron_tropd.config import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study
import study_runs
import study_tables
from study_runs import METHODS, TASKS, Run


def _line(last: float, **more: object) -> dict:
    line = {"curve": [[0, 0.4], [100, last]], "lr": 3e-4, "reverse_kl": 0.5, "grad_norm": 1.0}
    line |= {"outlier_share_first": 0.1, "outlier_share": None, "grad_norm_variation": 0.2}
    return line | {"tokens_to_goal": None} | more


def test_every_run_is_a_config_of_its_own(tmp_path: Path) -> None:
    runs = list(study_runs.grid())
    assert len({run.key for run in runs}) == len(runs) == len(METHODS) * 3 * len(TASKS)
    for run in runs[:: len(TASKS)]:
        path = tmp_path / "run.toml"
        path.write_text(run.toml(tmp_path / "run"))
        config = load_config(path)
        assert config.train.lr == run.lr and config.train.seed == run.seed


def test_the_best_rate_of_a_whole_grid_is_taken() -> None:
    runs = [run for run in study_runs.grid() if (run.task, run.method) == ("arithmetic", "OPD")]
    lines = dict(zip(runs, map(_line, (0.5, 0.7, 0.6)), strict=True))
    assert study.chosen_rates(lines) == {("arithmetic", "OPD"): runs[1].lr}
    lines.pop(runs[0])
    assert study.chosen_rates(lines) == {}
    stories = [run for run in study_runs.grid() if (run.task, run.method) == ("stories", "OPD")]
    lines = dict(zip(stories, map(_line, (0.5, 0.7, 0.6)), strict=True))
    assert study.chosen_rates(lines) == {("stories", "OPD"): stories[0].lr}


@pytest.mark.parametrize(
    ("curve", "larger", "expected"),
    [
        ([(0, 0.4), (2, 0.5), (4, 0.7)], True, 300),
        ([(0, 0.4), (2, 0.5)], True, None),
        ([(0, 1.0), (2, 0.5), (4, 0.4)], False, 160),
        ([(2, 0.7)], True, 200),
    ],
)
def test_tokens_to_a_goal_lie_between_evaluations(
    curve: list[tuple[int, float]], larger: bool, expected: int | None
) -> None:
    assert study._tokens_to(curve, [100] * 4, 0.6, larger) == expected


def test_a_difference_is_bold_only_if_its_interval_leaves_zero_out() -> None:
    of = {seed: Run("arithmetic", "OPD", 3e-4, seed) for seed in (1, 2, 3)}
    exact = {seed: Run("arithmetic", "OPD, exact", 3e-4, seed) for seed in (1, 2, 3)}
    mask = {seed: Run("arithmetic", "TrOPD, mask", 3e-4, seed) for seed in (1, 2, 3)}
    lines = {run: _line(0.5 + seed / 100) for seed, run in of.items()}
    lines |= {run: _line(0.6 + seed / 99) for seed, run in exact.items()}
    lines |= {run: _line(0.5 + (seed - 2) / 10) for seed, run in mask.items()}
    text = study_tables.tables(lines)
    (better,) = [row for row in text.splitlines() if row.startswith("| OPD, exact")]
    assert "**+0.100 (" in better and "| 3 | 0.620 (" in better
    (unclear,) = [row for row in text.splitlines() if row.startswith("| TrOPD, mask")]
    assert "-0.020 (" in unclear and "**" not in unclear.split("|")[5]


def test_a_mean_of_differences_has_students_interval() -> None:
    mean, low, high = study_tables.paired({1: 1.0, 2: 2.0, 3: 6.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert mean == 3.0
    # s = sqrt(7), n = 3, t = 4.303.
    assert (low, high) == (pytest.approx(3 - 6.5729, abs=1e-3), pytest.approx(9.5729, abs=1e-3))
