"""Two tasks from one TOML file: a run of them, told apart, and resumed bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import warm_commands
from warm_engines import environment_of_commands

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 4
TIMINGS = ("seconds_", "tokens_per_second", "peak_memory", "waiting_share")
SETS = (
    ("arithmetic", EXAMPLES / "arithmetic" / "heldout.jsonl"),
    ("sums", EXAMPLES / "two_tasks" / "sums_heldout.jsonl"),
)

pytestmark = pytest.mark.slow


def _distill(folder: Path, run: Path) -> None:
    sets = ", ".join(
        f'{{name = "{name}", of_task = "{name}", problems = "{path}", num_problems = 12, '
        "samples = 2, temperature = 0.7}"
        for name, path in SETS
    )
    small = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.prompts_per_step": 6,
        "rollout.samples_per_prompt": 2,
        "train.steps": STEPS,
        "train.warmup_steps": 0,
        "evaluation.every": 2,
        "evaluation.teacher": "false",
        "evaluation.sets": f"[{sets}]",
        "run.checkpoint_every": 2,
        "run.dir": run,
    }
    settings = [f"{name}={value}" for name, value in small.items()]
    ended = warm_commands.run(
        ["distill", EXAMPLES / "two_tasks" / "two_tasks.toml", *settings],
        folder=folder,
        environment=environment_of_commands(folder / "warm"),
    )
    assert ended.returncode == 0, ended.stderr


def _numbers(path: Path) -> list[dict[str, Any]]:
    """Records without what time alone decides."""
    return [
        {name: v for name, v in json.loads(line).items() if not name.startswith(TIMINGS)}
        for line in path.read_text().splitlines()
    ]


def test_two_tasks_are_trained_told_apart_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _distill(tmp_path, whole)
    metrics = _numbers(whole / "metrics.jsonl")
    assert len(metrics) == STEPS
    for record in metrics:
        shares = [record[f"task/{name}/token_share"] for name, _ in SETS]
        assert sum(shares) == pytest.approx(1) and all(0 < share < 1 for share in shares)
        assert 6 * 0.25 - 1 < record["task/sums/sequences"] / 2 < 6 * 0.25 + 1
    assert {record["task/sums/sequences"] for record in metrics} == {2, 4}
    evaluations = _numbers(whole / "evaluations.jsonl")
    assert [(r["step"], r["set"], r["total"]) for r in evaluations] == [
        (step, name, 24) for step in (0, 2, 4) for name, _ in SETS
    ]
    assert all("pass@2" in record and "majority@2" in record for record in evaluations)
    assert evaluations[1]["settings"]["grader"]["name"] == "last_number"
    assert (whole / "evaluations" / "student_step_000004" / "sums.jsonl").is_file()
    # As a run that was killed after its third step: its newest checkpoint is of the second.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    shutil.rmtree(resumed / "student_hf")
    (resumed / "summary.json").unlink()
    _distill(tmp_path, resumed)
    assert _numbers(resumed / "metrics.jsonl") == metrics
    assert _numbers(resumed / "evaluations.jsonl") == evaluations
    weights = "student_hf/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()
