"""The logs of a run: complete lines, exact resumption, copies for TensorBoard and W&B."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.records import read_lines


def _log(folder: Path, **settings: Any) -> MetricsLog:
    return MetricsLog(folder, **{"tensorboard": False, **settings})


def test_records_come_back_as_written(tmp_path: Path):
    log = _log(tmp_path / "new" / "run")
    log.write({"step": 1, "loss": 0.1 + 0.2, "acceptance_by_position": [0.5, None]})
    log.write({"step": 2, "loss": float("nan"), "acceptance_by_position": [float("inf")]})
    log.close()
    assert read_lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1 + 0.2, "acceptance_by_position": [0.5, None]},
        {"step": 2, "loss": None, "acceptance_by_position": [None]},
    ]


def test_resumed_log_equals_an_uninterrupted_one(tmp_path: Path):
    """Killed in step 5 while writing it, resumed from the checkpoint of step 3."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        log = _log(folder)
        for step in range(1, 6):
            _write_step(log, folder, step)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        path = broken / name
        path.write_bytes(path.read_bytes()[:-7])
    log = _log(broken)
    log.truncate_after(3)
    for step in range(4, 6):
        _write_step(log, broken, step)
    assert _contents(broken) == _contents(whole)


def _write_step(log: MetricsLog, folder: Path, step: int) -> None:
    (folder / "trajectories").mkdir(exist_ok=True)
    (folder / "trajectories" / f"step_{step:06d}.jsonl").write_text(f'{{"step": {step}}}\n')
    log.write({"step": step, "loss": step / 3})
    log.write_evaluation({"step": step, "model": "student", "accuracy": step / 7})


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_truncating_removes_later_trajectories(tmp_path: Path):
    (tmp_path / "trajectories").mkdir()
    for step in (0, 25, 50):
        (tmp_path / "trajectories" / f"step_{step:06d}.jsonl").write_text("{}\n")
    _log(tmp_path).truncate_after(25)
    left = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert left == ["step_000000.jsonl", "step_000025.jsonl"]


def test_tensorboard_gets_the_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = _log(tmp_path, tensorboard=True)
    log.write({"step": 1, "loss": 0.5, "tv": None, "acceptance_by_position": [0.5]})
    log.write_evaluation({"step": 1, "model": "student", "accuracy": 0.25, "total": 500})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "eval_student_accuracy", "eval_student_total"}
    assert events.Scalars("loss")[0].step == 1
    assert events.Scalars("eval_student_accuracy")[0].value == 0.25


def test_missing_wandb_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb_project.*\.\[wandb\]"):
        _log(tmp_path, wandb_project="tropd")


def test_wandb_run_is_resumed_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    def init(**settings: Any) -> types.SimpleNamespace:
        started.append(settings)
        return types.SimpleNamespace(log=logged.append, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        log = _log(tmp_path, wandb_project="tropd", config={"train": {"lr": 0.1}})
        log.write({"step": step, "loss": 0.5, "tv": None})
        log.close()
    assert started[0] == started[1]
    assert started[0]["id"] and started[0]["config"] == {"train": {"lr": 0.1}}
    assert logged == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["tv"] is None
