"""Ten steps of training on a GPU against the same ten steps on this machine's CPU.

Real Megatron-Core models of two families, its optimizer, the teacher, the loss from hidden states
and the choices that look at the whole batch first: all that a run does between rollouts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.test_training import METHODS, STEPS, history_file
from tests.ranks import free_port

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
# Triton and torch.compile build what launches their kernels.
pytestmark = [pytest.mark.gpu, pytest.mark.needs("compiler")]

RUNS = [*(("tp1", "float32", method) for method in METHODS), ("tp1", "bfloat16", "tropd")]
PROGRAM = "import json, sys; from tests.distributed.test_training import train_all; "
PROGRAM += "train_all(*json.loads(sys.argv[1]))"


@pytest.fixture(scope="module")
def histories(tmp_path_factory, tiny_model) -> dict[tuple[str, tuple[str, str, str]], torch.Tensor]:
    """(device, run) -> [steps, 5] gradient norm, loss, TV, reverse KL and selected share."""
    student = tiny_model("llama", tie_word_embeddings=True)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        _train_on(device, [str(student), str(teacher), RUNS, str(folder)])
        for run in RUNS:
            rows = json.loads((folder / history_file(run)).read_text())
            found[device, run] = torch.tensor(rows, dtype=torch.float64)[:, :5]
    return found


def _train_on(device: str, arguments: list[object]) -> None:
    """Run ``train_all`` in a process of its own, which sees the GPU or does not."""
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NVIDIA_TF32_OVERRIDE": "0",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    tail = "\n".join(run.stdout.splitlines()[-100:])
    assert run.returncode == 0, f"training on {device} ended with {run.returncode}:\n{tail}"


@pytest.mark.parametrize("method", METHODS)
def test_float32_on_the_gpu_is_float32_on_the_cpu(method, histories):
    run = ("tp1", "float32", method)
    torch.testing.assert_close(
        histories["cuda", run], histories["cpu", run], rtol=1e-3, atol=1e-4, equal_nan=True
    )


def test_bfloat16_on_the_gpu_follows_float32_on_the_cpu(histories):
    torch.testing.assert_close(
        histories["cuda", ("tp1", "bfloat16", "tropd")],
        histories["cpu", ("tp1", "float32", "tropd")],
        rtol=0.15,
        atol=0.05,
    )


def test_training_on_the_gpu_brings_the_student_closer(histories):
    reverse_kl = histories["cuda", ("tp1", "bfloat16", "tropd")][:, 3]
    assert len(reverse_kl) == STEPS and reverse_kl[-3:].mean() < 0.95 * reverse_kl[0]
