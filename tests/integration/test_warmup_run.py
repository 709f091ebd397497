"""`tropd distill` that first samples from between student and teacher, and is resumed there."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import warm_commands
from calm_run import TIMINGS
from warm_engines import environment_of_commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
STEPS, WARMUP, EPSILON, SAVED = 4, 3, 0.06, 1


def distill(folder: Path, prompts: Path) -> list[dict[str, Any]]:
    """The example on one rank with few samples; its metrics."""
    settings = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.prompts": prompts,
        "rollout.max_new_tokens": 24,
        "rollout.prompts_per_step": 4,
        "rollout.warmup_steps": WARMUP,
        "rollout.epsilon": EPSILON,
        "train.steps": STEPS,
        "train.lr": 1e-3,
        "train.warmup_steps": 0,
        "evaluation.num_problems": 4,
        "evaluation.teacher": "false",
        "evaluation.max_new_tokens": 8,
        "run.dir": folder,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": STEPS,
        "run.tensorboard": "false",
        "run.trajectories_every": 0,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    done = warm_commands.run(
        ["distill", PAIR / "trb.toml", *words],
        environment=environment_of_commands(folder.parent / "warm"),
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def test_a_run_warms_up_with_the_teacher_and_resumes_in_between(tmp_path: Path):
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "run"
    with (PAIR / "prompts.jsonl").open() as file:
        prompts.write_text("".join(islice(file, 8)))
    metrics = distill(folder, prompts)
    assert len(metrics) == STEPS
    for step, record in enumerate(metrics):
        # The student that drafts has the weights of the step before, as the student alone has.
        assert record["engine_gap_max"] < 1e-3
        if step < WARMUP:
            assert 0 < record["behaviour_kl"] <= EPSILON * (1 - step / WARMUP)
            assert 0 < record["behaviour_teacher_share"] <= 1
            assert 1 <= record["tokens_per_teacher_pass"] <= 6
        else:
            assert not any("behaviour" in name for name in record)
    assert (folder / "logs" / "engine_blended_000.log").exists()

    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > SAVED:
            shutil.rmtree(checkpoint)
    (folder / "summary.json").unlink()
    assert distill(folder, prompts) == metrics
