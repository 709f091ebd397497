"""`tropd distill` with adapters: engines get merged weights, and a resumed run is the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_commands
from calm_run import TIMINGS
from safetensors.torch import load_file
from warm_engines import environment_of_commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
STEPS, SAVED = 3, 1


def distill(folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The example on one rank with few samples; its metrics."""
    settings = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.max_new_tokens": 24,
        "rollout.prompts_per_step": 4,
        "train.steps": STEPS,
        "train.warmup_steps": 0,
        "evaluation.num_problems": 4,
        "evaluation.teacher": "false",
        "evaluation.every": 0,
        "evaluation.max_new_tokens": 8,
        "run.dir": folder,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": STEPS,
        "run.tensorboard": "false",
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    command = ["distill", PAIR / "lora.toml", *words]
    done = warm_commands.run(command, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines]


def test_a_run_trains_adapters_and_resumes_as_if_never_stopped(tmp_path: Path):
    folder, environment = tmp_path / "run", environment_of_commands(tmp_path / "warm")
    metrics = distill(folder, environment)
    # The engine has the adapters of the step before, merged.
    assert all(0 < step["engine_gap_max"] < 1e-3 for step in metrics)
    adapter = folder / "student_adapter" / "adapter_model.safetensors"
    first = adapter.read_bytes()
    assert any(t.abs().max() > 0 for n, t in load_file(adapter).items() if "lora_B" in n)
    before, after = (
        load_file(model / "model.safetensors")
        for model in (PAIR / "student", folder / "student_hf")
    )
    same = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert same == {name for name in before if "norm" in name or "embed" in name}

    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > SAVED:
            shutil.rmtree(checkpoint)
    (folder / "summary.json").unlink()
    adapter.unlink()
    assert distill(folder, environment) == metrics
    assert adapter.read_bytes() == first
