"""ERPD's two stages by their commands: recorded rollouts, graded; a teacher with a reference."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import warm_commands
from warm_engines import environment_of_commands

from megatron_tropd.config import load_config
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.sequence_files import FORMAT, record_of
from megatron_tropd.data.tokenizers import fingerprint, load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PAIR = REPOSITORY / "examples" / "arithmetic"
PROMPTS, STEPS = 6, 2

pytestmark = pytest.mark.slow


def _record(folder: Path) -> list[int]:
    """Two answers to each prompt, the first right, the second longer; tokens of each answer."""
    with (PAIR / "prompts.jsonl").open() as file:
        (folder / "prompts.jsonl").write_text("".join(islice(file, PROMPTS)))
    rollout = load_config(PAIR / "erpd.toml").rollout
    tokenizer = load_tokenizer(PAIR / "student")
    prompts = load_prompts(folder / "prompts.jsonl", tokenizer, rollout, max_prompt_tokens=64)
    lines: list[dict[str, Any]] = [{"format": FORMAT, "tokenizer": fingerprint(tokenizer)}]
    lengths = []
    for prompt in prompts:
        for sample, text in enumerate((f"#### {prompt.fields['answer']}", "#### none of these")):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            runs = (Writer.CONTEXT, prompt.token_ids), (Writer.STUDENT, ids)
            key = SampleKey(0, prompt.index, sample)
            made = TokenSequence.of_runs(key, *runs, logprobs=[-1.0] * len(ids))
            lines.append(record_of(made))
            lengths.append(len(ids))
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lengths


def _distil(folder: Path, stage: str, *overrides: str) -> list[dict[str, Any]]:
    """Run a stage's file, made small, and read what it logged."""
    small = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.recorded": folder / "rollouts.jsonl",
        "rollout.samples_per_prompt": 2,
        "rollout.prompts_per_step": PROMPTS,
        "train.steps": STEPS,
        "train.warmup_steps": 0,
        "evaluation.problems": folder / "prompts.jsonl",
        "evaluation.teacher": "false",
        "run.dir": folder / stage,
    }
    settings = [f"{name}={value}" for name, value in small.items()]
    run = warm_commands.run(
        ["distill", PAIR / f"{stage}.toml", *settings, *overrides],
        folder=folder,
        environment=environment_of_commands(folder / "warm"),
    )
    assert run.returncode == 0, run.stderr
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_both_stages(tmp_path: Path):
    lengths = _record(tmp_path)
    first, second = _distil(tmp_path, "erpd_teacher")
    assert first["tokens_student"] == sum(lengths), "the recorded tokens and no others"
    assert first["loss"] == pytest.approx(0.25, abs=1e-6), "A is +-1/2, the log-ratio 0"
    assert first["grad_norm"] > 0 and second["loss"] != first["loss"]

    fitted = f"model.teacher={tmp_path / 'erpd_teacher' / 'student_hf'}"
    first, second = _distil(tmp_path, "erpd", fitted, "loss.importance=none")
    # The reference is the student of the first step, so the reward is log p - log q there.
    assert first["loss"] == pytest.approx(first["k1"], abs=1e-6) and abs(first["k1"]) > 1e-5
    assert first["grad_norm"] > 0 and abs(second["loss"] - second["k1"]) > 1e-7
