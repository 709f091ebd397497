"""The Triton kernels without a GPU: their numbers, in the interpreter (code: test_kernels.py).

The interpreter has to be asked for before Triton is imported, so it runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.losses import dense
from megatron_tropd.losses.dense import DenseSpec, Scratch
from megatron_tropd.losses.dense_inplace import InPlacePasses
from megatron_tropd.losses.passes import needs_scratch, passes_for

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """All of ``tests/gpu/test_triton.py`` that needs no GPU."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/test_triton.py"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stdout[-8000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 120, run.stdout[-2000:]


def test_which_passes_serve_a_device(monkeypatch):
    """A stand-in for a tensor: nothing but its device is asked for."""
    from megatron_tropd.losses import dense_triton

    cuda, cpu = torch.device("cuda"), torch.zeros(1, 4)
    gpu = SimpleNamespace(is_cpu=False, device=cuda)
    scratch = Scratch(4, torch.device("cpu"))

    def module(logits):
        return passes_for(logits, None, DenseSpec(), scratch)._module

    assert module(gpu) is dense_triton
    assert isinstance(passes_for(cpu, None, DenseSpec(), scratch), InPlacePasses)
    assert not needs_scratch(cuda) and needs_scratch(cpu.device)
    monkeypatch.setenv("TROPD_PLAIN", "1")
    assert module(gpu) is dense and module(cpu) is dense
    assert needs_scratch(cuda)


def test_scratch_takes_no_memory_before_it_is_used():
    scratch = Scratch(2**40, torch.device("cpu"))
    assert scratch.rows == 1 and "buffers" not in vars(scratch)
