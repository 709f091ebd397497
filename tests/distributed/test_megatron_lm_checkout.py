"""README's diff in a script laid out like Megatron's own, started as the docs start it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_lm import CHECKOUT, command_line, history, with_readme_diff

from tests.ranks import free_port

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def teacher(tiny_model: Callable[..., Path]) -> Path:
    """Another architecture than the student's."""
    return tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """A checkout with README's diff."""
    folder = tmp_path_factory.mktemp("checkout") / "checkout"
    shutil.copytree(CHECKOUT.parent, folder)
    changed = folder / CHECKOUT.name
    changed.write_text(with_readme_diff(changed.read_text()))
    return changed


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory, teacher: Path) -> Path:
    """Responses the teacher likes best, so that a new student's log q - log p is below zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher)
    prompts = torch.randint(3, 259, (8 * STEPS, 5), generator=torch.Generator().manual_seed(2))
    likes = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), **likes)
    lines: list[dict] = [{"format": "tropd-rollouts-1"}]
    for index, ids in enumerate(whole.tolist()):
        lines.append(
            {
                "prompt_index": index,
                "sample_index": 0,
                "prompt_ids": ids[:5],
                "response_ids": ids[5:],
                "segments": [["student", len(ids) - 5]],
                "rollout_logprobs": [-5.0] * (len(ids) - 5),
                "finish_reason": "length",
                "weights": "none",
                "seed": 0,
            }
        )
    path = tmp_path_factory.mktemp("recorded") / "round.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _run(script: Path, arguments: str, *, cwd: Path) -> str:
    """What one rank prints; as torchrun would start it."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "megatron_tropd.integrations.on_cpu"]
    done = subprocess.run(
        [*command, *command_line(script, f"--train-iters {STEPS} {arguments}")],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | ranks | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_readme_diff_trains_on_trajectories(script, teacher, trajectories, tmp_path):
    """The provider knows nothing of trajectories; values below zero are printed as well."""
    distil = f"--tropd-teacher-load {teacher} --tropd-method tropd --check-for-spiky-loss"
    log = _run(script, f"{distil} --tropd-trajectories {trajectories}", cwd=tmp_path)
    assert f"training on the {8 * STEPS} trajectories of {trajectories}" in log
    for name in ("tropd loss", "lm loss", "k1", "outlier"):
        assert len(history(log, name)) == STEPS, f"{name} is not in every line"
    assert (history(log, "k1") < -0.5).all()


def test_readme_diff_changes_nothing_by_itself(script, tmp_path):
    plain, changed = (_run(path, "--mock-data", cwd=tmp_path) for path in (CHECKOUT, script))
    for name in ("lm loss", "grad norm"):
        assert torch.equal(history(plain, name), history(changed, name))
