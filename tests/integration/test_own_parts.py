"""A run of parts that live outside of the package: method, teacher source and rollout mode."""

import json
import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from warm_engines import environment_of_commands

REPOSITORY = Path(__file__).resolve().parents[2]
PAIR = REPOSITORY / "examples" / "arithmetic"
TOML = f"""
[model]
student = "{PAIR}/student"
teacher = "{PAIR}/teacher"
[rollout]
prompts = "prompts.jsonl"
mode = "toy_episodes:TWO_TURNS"
max_new_tokens = 24
prompts_per_step = 4
engine_cpu_kv_gib = 0.25
[teacher]
source = "toy_parts:Indifferent"
[guidance]
prefixed_per_prompt = 0
[loss]
method = "toy_parts:Squared"
share = 0.25
[train]
steps = 2
lr = 1e-4
warmup_steps = 0
tokens_per_micro_batch = 4096
[run]
dir = "run"
trajectories_every = 1
"""

pytestmark = pytest.mark.slow


def test_a_run_of_somebody_elses_parts(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(TOML)
    with (PAIR / "prompts.jsonl").open() as file:
        (tmp_path / "prompts.jsonl").write_text("".join(islice(file, 8)))
    command = [sys.executable, "-m", "megatron_tropd.cli", "distill", "own.toml"]
    # With the folder of the parts, tests, on the path.
    environment = os.environ | environment_of_commands(tmp_path / "warm")
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    root = tmp_path / "run"
    steps = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    vocab = json.loads((PAIR / "student" / "config.json").read_text())["vocab_size"]
    for step in steps:
        assert step["grad_norm"] > 0 and step["tokens_student"] > 0
        # KL(q || uniform) = log V - H(q).
        expected = math.log(vocab) - step["student_entropy"]
        assert step["reverse_kl"] == pytest.approx(expected, rel=1e-3)
    assert "sequences of each step: [16, 16]" in (root / "logs" / "rank_000.log").read_text()
    examples = [
        json.loads(line)
        for dump in sorted((root / "trajectories").glob("*.jsonl"))
        for line in dump.read_text().splitlines()
    ]
    writers = {writer for example in examples for writer in example["segment"]}
    assert writers == {"student", "context"}, "a tool spoke between two turns"
