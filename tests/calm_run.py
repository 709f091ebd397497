"""One run of `tropd distill` that nobody disturbs, for every test that compares another with it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import warm_commands
from filelock import FileLock
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from warm_engines import environment_of_commands

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 12
TROPD = [sys.executable, "-m", "megatron_tropd.cli"]
TIMINGS = ("seconds_", "tokens_per_second", "peak_memory", "waiting_share")


@dataclass(frozen=True)
class CalmRun:
    """Read-only: other tests compare with it too. Starting its command again changes nothing."""

    root: Path

    @property
    def student(self) -> Path:
        """A tied Llama with columns that its teacher lacks."""
        return self.root / "student"

    @property
    def teacher(self) -> Path:
        """An untied, wider Qwen3."""
        return self.root / "teacher"

    @property
    def config(self) -> Path:
        """TOML of a short run with guidance, evaluation, checkpoints and dumps."""
        return self.root / "tropd.toml"

    @property
    def unevaluated(self) -> Path:
        """The same without evaluations, hence without the teacher's engines; no other number."""
        return self.root / "unevaluated.toml"

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.root / "run"

    @property
    def printed(self) -> str:
        """What its command printed."""
        return (self.root / "printed.txt").read_text()


def calm_run(root: Path) -> CalmRun:
    """The run in ``root``, made there by whoever asks first."""
    run = CalmRun(root)
    with FileLock(f"{root}.lock"):
        if not root.exists():
            root.mkdir()
            _make(run)
    assert (run.folder / "summary.json").exists(), run.printed
    return run


def _make(run: CalmRun) -> None:
    overrides = {"tie_word_embeddings": True, "vocab_size": 300}
    write_tiny_model(run.student, "llama", **overrides)
    write_tiny_model(run.teacher, "qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(12)]
    for name in ("prompts.jsonl", "heldout.jsonl"):
        (run.root / name).write_text("\n".join(lines) + "\n")
    _write_configs(run)
    environment = environment_of_commands(run.root / "warm")
    responses = [
        *("responses", "--teacher", str(run.teacher)),
        *("--prompts", str(run.root / "prompts.jsonl"), "--max-new-tokens", "16"),
        *("--out", str(run.root / "responses.jsonl")),
    ]
    distil = ["distill", run.config, f"run.dir={run.folder}"]
    for words in (responses, distil):
        done = warm_commands.run(words, environment=environment, folder=REPOSITORY)
        (run.root / "printed.txt").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, run.printed


def _write_configs(run: CalmRun) -> None:
    run.config.write_text(f"""
        [model]
        student = "{run.student}"
        teacher = "{run.teacher}"
        [parallel]
        tensor = 2
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 16
        prompts_per_step = 4
        samples_per_prompt = 2
        engine_cpu_kv_gib = 0.25
        [guidance]
        responses = "responses.jsonl"
        beta = 0.1
        [loss]
        method = "tropd"
        top_k = 16
        [train]
        steps = {STEPS}
        lr = 1e-3
        [evaluation]
        problems = "heldout.jsonl"
        every = 3
        [run]
        dir = "unset"
        deterministic = true
        checkpoint_every = 2
        trajectories_every = 3
        timeout_minutes = 10
    """)
    text = run.config.read_text()
    run.unevaluated.write_text(text.replace('problems = "heldout.jsonl"', ""))


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of a log without what differs from run to run, or with the form of a model's files."""
    return [
        {k: v for k, v in json.loads(line).items() if k != "digests" and not k.startswith(TIMINGS)}
        for line in path.read_text().splitlines()
    ]


def assert_same(folder: Path, calm: CalmRun, *logs: str) -> None:
    """The logs and the exported student are those of the calm run, bit for bit."""
    for name in logs:
        assert records(folder / name) == records(calm.folder / name), name
    ours, theirs = (
        load_file(f / "student_hf" / "model.safetensors") for f in (folder, calm.folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
