"""The study's runs are complete configs, and its tables say what its lines say."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tropd.config import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study
import study_plots
import study_runs
import study_tables
from study_runs import METHODS, TASKS, Run


def _line(last: float, **more: object) -> dict:
    line = {"curve": [[0, 0.4], [60, last]], "tokens": [0, 1000], "lr": 3e-4, "grad_norm": 1.0}
    line |= {"reverse_kl": 0.5, "reverse_kl_curve": [0.5] * 10, "grad_norm_variation": 0.2}
    line |= {"tv": 0.1, "tv_first": 0.2, "outlier_share": None, "outlier_share_first": 0.1}
    return line | more


def _all_runs() -> list[Run]:
    """What is made in the end, if the largest rate of each grid but one is the best."""
    values: study_runs.Values = {}
    while left := study_runs.next_runs(values):
        lrs = TASKS[left[0].task].lrs
        values |= {run: -abs(run.lr - lrs[-2]) for run in left}
    return list(values)


def test_every_run_is_a_config_of_its_own(tmp_path: Path) -> None:
    runs = _all_runs()
    assert len({run.key for run in runs}) == len(runs)
    assert {run.method for run in runs} == set(METHODS)
    assert {run.task for run in runs} == set(TASKS)
    for run in {(run.task, run.method): run for run in runs}.values():
        path = tmp_path / "run.toml"
        path.write_text(run.toml(tmp_path / run.key))
        config = load_config(path)
        assert config.train.lr == run.lr and config.train.seed == run.seed
        assert config.run.dir == str(tmp_path / run.key)


def test_a_method_has_three_rates_then_its_seeds() -> None:
    of = [run for run in _all_runs() if (run.task, run.method) == ("dialect", "OPD")]
    lrs = TASKS["dialect"].lrs
    assert [run.lr for run in of if run.seed == study_runs.GRID_SEED] == list(lrs[1:])
    reported = [(run.lr, run.seed) for run in of if run.seed != study_runs.GRID_SEED]
    assert reported == [(lrs[2], seed) for seed in study_runs.MAIN_SEEDS]


@pytest.mark.parametrize(
    ("values", "best", "missing"),
    [
        ({}, None, [1, 2]),
        ({1: 0.5}, None, [2]),
        ({1: 0.5, 2: 0.4}, None, [0]),
        ({1: 0.4, 2: 0.5}, None, [3]),
        ({1: 0.4, 2: 0.5, 3: 0.3}, 2, []),
        ({1: 0.4, 2: 0.5, 3: 0.6}, 3, []),
        ({0: 0.6, 1: 0.5, 2: 0.4}, 0, []),
    ],
)
def test_the_search_of_a_rate_ends_between_worse_ones_or_at_the_end(
    values: dict[int, float], best: int | None, missing: list[int]
) -> None:
    lrs = TASKS["arithmetic"].lrs

    def run(place: int) -> Run:
        return Run("arithmetic", "OPD", lrs[place], study_runs.GRID_SEED)

    found = study_runs.rate("arithmetic", "OPD", {run(at): v for at, v in values.items()})
    assert found == (None if best is None else lrs[best], [run(at) for at in missing])


def test_of_a_divergence_the_smaller_value_is_the_better_one() -> None:
    run = Run("stories", "OPD", 5e-4, study_runs.GRID_SEED)
    assert study.last_values({run: _line(0.7)}) == {run: -0.7}


def test_runs_whose_rates_differ_share_no_file(tmp_path: Path) -> None:
    """0.0001 and 0.0003 are no suffixes."""
    first, second = (tmp_path / Run("arithmetic", "OPD", lr, 1).key for lr in (1e-4, 3e-4))
    with study._claimed(first) as mine, study._claimed(second) as also_mine:
        assert mine and also_mine
        with study._claimed(first) as again:
            assert not again


def test_a_softened_teacher_divides_its_logits(tmp_path: Path) -> None:
    source, target = tmp_path / "teacher", tmp_path / "soft"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {"lm_head.weight": torch.ones(2, 3), "model.norm.weight": torch.ones(3)}
    save_file(tensors, source / "model.safetensors")
    study.soften(source, target, 2.0)
    found = load_file(target / "model.safetensors")
    assert found["lm_head.weight"].eq(0.5).all() and found["model.norm.weight"].eq(1).all()
    assert (target / "config.json").exists() and len(list(tmp_path.iterdir())) == 2


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
    assert study_tables.tokens_to(curve, [100 * step for step, _ in curve], 0.6, larger) == expected


def test_tokens_to_a_divergence_are_those_of_the_middles_of_tenths() -> None:
    line = _line(0.5, reverse_kl_curve=[1.0, 0.8, 0.4, *[0.3] * 7])
    assert study_tables._tokens_to_kl(line, 0.6) == 200
    assert study_tables._tokens_to_kl(line, 0.2) is None


def test_a_difference_is_bold_only_if_its_interval_leaves_zero_out() -> None:
    of = {seed: Run("arithmetic", "OPD", 3e-4, seed) for seed in (1, 2, 3)}
    exact = {seed: Run("arithmetic", "OPD, exact", 3e-4, seed) for seed in (1, 2, 3)}
    mask = {seed: Run("arithmetic", "TrOPD, mask", 3e-4, seed) for seed in (1, 2, 3)}
    lines = {run: _line(0.5 + seed / 100) for seed, run in of.items()}
    lines |= {run: _line(0.6 + seed / 99) for seed, run in exact.items()}
    lines |= {run: _line(0.5 + (seed - 2) / 10) for seed, run in mask.items()}
    text = study_tables.tables(lines)
    better, *_ = [row for row in text.splitlines() if row.startswith("| OPD, exact")]
    assert "**+0.100 (" in better and "| 3 of 5 | 0.620 (" in better
    unclear, *_ = [row for row in text.splitlines() if row.startswith("| TrOPD, mask")]
    assert "-0.020 (" in unclear and "**" not in unclear.split("|")[5]


def test_a_mean_of_differences_has_students_interval() -> None:
    mean, low, high = study_tables.paired({1: 1.0, 2: 2.0, 3: 6.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert mean == 3.0
    assert study_tables.paired({1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5, 3: 0.0}) is None
    # s = sqrt(7), n = 3, t = 4.303.
    assert (low, high) == (pytest.approx(3 - 6.5729, abs=1e-3), pytest.approx(9.5729, abs=1e-3))


def test_an_answer_is_a_word_only_if_its_interval_leaves_zero_out() -> None:
    assert study_tables.verdict((0.1, 0.05, 0.15), larger=True) == "better"
    assert study_tables.verdict((0.1, 0.05, 0.15), larger=False) == "worse"
    assert study_tables.verdict((0.1, -0.05, 0.25), larger=True) == "not told apart"


def test_a_study_that_has_only_begun_has_tables() -> None:
    lines = {Run("arithmetic", "OPD", 3e-4, study_runs.GRID_SEED): {"curve": [[0, 0.4], [60, 0.5]]}}
    text = study_tables.tables(lines)
    assert "1 of about" in text and "| arithmetic | OPD | 0.0003: 0.500 |" in text
    text = study_tables.tables(lines | {Run("arithmetic", "OPD", 3e-4, 1): _line(0.5)})
    assert "| OPD | 0.0003 | 1 of 5 | 0.500 |  |" in text


def test_the_page_gets_new_tables_in_the_place_of_the_old() -> None:
    lines = {Run("arithmetic", "OPD", 3e-4, study_runs.GRID_SEED): {"curve": [[0, 0.4], [60, 0.5]]}}
    page = f"text\n\n{study.MARKS[0]}\n\nold\n\n{study.MARKS[1]}\n\nmore\n"
    once = study.with_tables(page, lines)
    assert once.startswith("text\n") and once.endswith("\n\nmore\n") and "old" not in once
    assert study.with_tables(once, lines) == once


def test_a_difference_that_is_told_apart_has_the_colour_of_its_verdict() -> None:
    lines = {Run("arithmetic", "OPD", 3e-4, seed): _line(0.5 + seed / 100) for seed in (1, 2, 3)}
    for method, gain in (("OPD, exact", 0.1), ("OPSA", -0.1)):
        for seed in (1, 2, 3):
            line = _line(0.5 + seed / 99 + gain)
            lines[Run("arithmetic", method, 3e-4, seed)] = line
    text = study_plots.differences(lines)
    assert text.count("fill:var(--good)") == 1 and text.count("fill:var(--bad)") == 1
    assert text.count("fill:var(--gray)") == 2  # reverse KL
    assert "OPD, exact" in text and "TRB" not in text
