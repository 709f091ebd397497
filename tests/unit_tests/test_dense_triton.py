"""The Triton kernels without a GPU: their numbers in the interpreter, their code by the compiler.

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
from megatron_tropd.losses.dense import SUMS, DenseSpec, RowCoefficients, Scratch
from megatron_tropd.losses.dense_inplace import InPlacePasses
from megatron_tropd.losses.passes import needs_scratch, passes_for

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS, TOKENS = 151_936, 2


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


class _Compiled:
    """In a kernel's place: compiles what would be launched."""

    def __init__(self, kernel, capability, made):
        self.kernel, self.capability, self.made = kernel, capability, made

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, num_warps, **flags):
        import triton
        from triton.backends.compiler import GPUTarget

        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | flags
        signature, constants, hints = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            one = isinstance(value, int) and value == 1  # a constant, as when launched
            kind = {float: "fp32", int: "i32", torch.Tensor: "*fp32"}.get(type(value))
            signature[name] = "constexpr" if name in flags or one else kind
            if signature[name] == "constexpr":
                constants[(place,)] = value
            elif kind == "*fp32" or value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, hints)
        target = GPUTarget("cuda", self.capability, 32)
        binary = triton.compile(source, target=target, options={"num_warps": num_warps})
        self.made.append((self.kernel.__name__, binary.asm["ptx"]))


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, monkeypatch, tmp_path):
    """What the compiler refuses, the interpreter may accept."""
    import triton

    if "nvidia" not in triton.backends.backends or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("no compiler for NVIDIA GPUs")
    from megatron_tropd.losses import dense_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made: list[tuple[str, str]] = []
    for name in [name for name in vars(dense_triton) if name.endswith("_kernel")]:
        compiled = _Compiled(getattr(dense_triton, name), capability, made)
        monkeypatch.setattr(dense_triton, name, compiled)
    logits, scratch = torch.zeros(TOKENS, COLUMNS), Scratch(COLUMNS, torch.device("cpu"))
    norm, factors = torch.zeros(TOKENS, 2), RowCoefficients(*torch.zeros(3, TOKENS))
    both = (logits, logits, norm, norm)

    dense_triton.max_and_sum_exp(logits, scratch)
    for reward in ("mixture", "trust_clip", "log_ratio"):
        spec = DenseSpec(SUMS, reward, tau=-1.0, teacher=True)
        dense_triton.row_sums(*both, spec, scratch)
        dense_triton.write_gradient(*both, factors, spec, scratch, logits)
    dense_triton.write_gradient(logits, None, norm, None, factors, DenseSpec(), scratch, logits)

    assert len(made) == 9
    for name, code in made:
        if name != "_combine_kernel":
            assert "ld.global.v4" in code, f"{name} loads single columns"
            assert code.count("st.global.v4") == 2 * (name == "_gradient_kernel")
        if name == "_row_sums_kernel":
            assert "min.NaN.f32" in code and "min.f32" not in code, "nan would be passed over"
    assert "max.NaN.f32" in made[0][1]


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
