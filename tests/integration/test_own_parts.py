"""A run of parts that live outside of the package: method, teacher source and rollout mode."""

import json
import math
from pathlib import Path

import pytest
import warm_commands
from warm_engines import environment_of_commands

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = REPOSITORY / "examples" / "own_parts"
PAIR = REPOSITORY / "examples" / "arithmetic"

pytestmark = pytest.mark.slow


def test_a_run_of_somebody_elses_parts(tmp_path: Path) -> None:
    root = tmp_path / "run"
    command = ["distill", PARTS / "own.toml", f"run.dir={root}"]
    environment = environment_of_commands(tmp_path / "warm", PARTS)
    run = warm_commands.run(command, environment=environment)
    assert run.returncode == 0, run.stderr
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
