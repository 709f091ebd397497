"""Offline distillation by its commands: rollouts scored once, then a run without a teacher."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm_commands
from warm_engines import environment_of_commands

from tests.integration.test_erpd import PAIR, PROMPTS, record_answers

STEPS = 3

pytestmark = pytest.mark.slow


def _tropd(folder: Path, command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    small = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.recorded": folder / "rollouts.jsonl",
        "rollout.samples_per_prompt": 2,
        "rollout.prompts_per_step": PROMPTS,
        "train.steps": STEPS,
        "train.warmup_steps": 0,
        "loss.method": "tropd",
        "evaluation.problems": folder / "prompts.jsonl",
        "evaluation.teacher": "false",
        "teacher.placement": "cached",
        "teacher.cache": folder / "scores",
        "run.dir": folder / "cached",
    }
    settings = [f"{name}={value}" for name, value in small.items()]
    return warm_commands.run(
        [command, PAIR / "opd.toml", *settings, *overrides],
        folder=folder,
        environment=environment_of_commands(folder / "warm"),
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_without_a_teacher_is_the_run_with_it(tmp_path: Path):
    lengths = record_answers(tmp_path)
    refused = _tropd(tmp_path, "distill")
    assert refused.returncode == 2 and "Make it with `tropd score`" in refused.stderr
    scored = _tropd(tmp_path, "score")
    assert scored.returncode == 0, scored.stderr
    assert f"{len(lengths)} sequences with {sum(lengths)} scored tokens" in scored.stdout
    for folder, placement in (("cached", "cached"), ("resident", "resident")):
        asked = f"teacher.placement={placement}", f"run.dir={tmp_path / folder}"
        run = _tropd(tmp_path, "distill", *asked)
        assert run.returncode == 0, run.stderr
    read, said = _metrics(tmp_path / "cached"), _metrics(tmp_path / "resident")
    assert len(read) == len(said) == STEPS
    for one, other in zip(read, said, strict=True):
        for name in ("loss", "grad_norm", "k1", "outlier_share", "tokens_student"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        assert one["reverse_kl"] is None and other["reverse_kl"] > 0
    log = (tmp_path / "cached" / "logs" / "rank_000.log").read_text()
    assert "no model of it is loaded" in log
    other = _tropd(tmp_path, "distill", "loss.method=gkd_jsd", f"run.dir={tmp_path / 'x'}")
    assert other.returncode == 2 and "a method that works with this one: tropd," in other.stderr
