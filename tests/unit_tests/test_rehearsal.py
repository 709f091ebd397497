"""A step on fake tensors: what it counts, what it notices, and that it agrees with real ones.

A process that rehearses believes in a GPU until it ends, so each test that does so starts one.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "recipes"
MEASURED = ROOT / "benchmarks" / "results" / "losses-gpu-1x-nvidia-h200.json"
_PRELUDE = """
import json, sys
sys.path[:0] = [{root!r}, {benchmarks!r}]
import torch
from megatron_tropd.rehearsal import cuda, world
from megatron_tropd.rehearsal.events import Events, line_running
from megatron_tropd.rehearsal.memory import Tracker
from megatron_tropd.rehearsal.tensors import Device, known
device = Device(Tracker(line_running), Events())
cuda.believe(device, gpus=8)
tracker, events = device.tracker, device.events
"""


def _rehearsed(code: str) -> Any:
    """What ``code`` leaves in ``answer``, in a process that believes in a GPU."""
    prelude = _PRELUDE.format(root=str(ROOT), benchmarks=str(ROOT / "benchmarks"))
    body = textwrap.indent(textwrap.dedent(code), "    ")
    text = f"{prelude}with device:\n{body}\nprint(json.dumps(answer))\n"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_known_program_has_its_known_peaks():
    answer = _rehearsed(
        """
        megabyte = 2**20
        def room(megabytes):
            return torch.empty(megabytes * megabyte, dtype=torch.uint8, device="cuda")
        with tracker.phase("one"):
            kept = room(3)
            view = kept[megabyte:]
            room(5)
            part = kept + 1
            del part
        with tracker.phase("two"):
            del kept
            other = room(1)
        del view
        with tracker.phase("rounded"):
            small = torch.empty(1, device="cuda")
            with tracker.one_kernel():
                result = (room(7) + 1)[:1].clone()
        answer = {
            name: [phase.peak, phase.end] for name, phase in tracker.phases.items()
        } | {"makers": dict(tracker.phases["one"].makers), "now": tracker.current}
        """
    )
    one = 2**20
    assert answer["one"] == [8 * one, 3 * one]  # a view holds the whole storage
    assert answer["two"] == [4 * one, 4 * one]
    assert answer["rounded"] == [one + 1024, one + 1024]
    assert answer["now"] == one + 1024


def test_autograd_keeps_what_it_keeps_on_a_gpu():
    """Of a product both factors, of a fused norm its input and one number a row."""
    answer = _rehearsed(
        """
        x = torch.empty(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        before = tracker.current
        y = torch.nn.functional.rms_norm(x, (512,), w, 1e-6)
        norm = tracker.current - before
        q = torch.empty(1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        before = tracker.current
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=True
        )
        attention = tracker.current - before
        (y.sum() + out.sum()).backward()
        answer = [norm, attention, str(x.grad.device), x.grad.is_cuda, x.grad.type()]
        """
    )
    assert answer[0] == 1024 * 512 * 2 + 1024 * 4
    assert 0 <= answer[1] - (1024 * 8 * 64 * 2 + 1024 * 8 * 4) <= 4096  # and two random states
    assert answer[2:] == ["cuda:0", True, "torch.cuda.BFloat16Tensor"]


def test_a_planted_wait_is_found_with_its_line():
    """In the source of a module of ours, through the trainer's own call."""
    answer = _rehearsed(
        """
        from megatron_tropd import step_metrics
        from megatron_tropd.mcore import step
        import inspect
        source = inspect.getsource(step.broken_gradients)
        model = torch.nn.Linear(4, 4, device="cuda")
        for parameter in model.parameters():
            parameter.main_grad = parameter.detach().clone()
        step.broken_gradients(model)
        first = inspect.getsourcelines(step.broken_gradients)[1]
        line = first + next(
            n for n, text in enumerate(source.splitlines()) if "isfinite" in text
        )
        answer = [[w.what, w.line, n] for w, n in events.waits.items()] + [line]
        """
    )
    *waits, line = answer
    assert waits == [["item", f"megatron_tropd/mcore/step.py:{line}", 2]]


def test_every_kind_of_wait_is_noted():
    answer = _rehearsed(
        """
        x = torch.empty(8, device="cuda")
        mask = (torch.arange(8, device="cuda") % 2 == 0)
        x[mask]; mask.nonzero(); x.sum().item(); x.cpu(); x.tolist(); float(x[0])
        torch.cuda.synchronize(); torch.tensor([1.0], device="cuda"); bool(mask.any())
        torch.ones(3).to("cuda", non_blocking=True)
        answer = [sorted([w.what, n] for w, n in events.waits.items()), list(x[mask].shape)]
        """
    )
    waits, shape = answer
    assert dict(waits) == {
        "boolean mask": 1,
        "nonzero": 1,
        "item": 3,
        "to the host": 2,
        "synchronize": 1,
        "to the device": 1,
    }
    assert shape == [4]


def test_a_mix_of_devices_fails():
    answer = _rehearsed(
        """
        x, on_host = torch.empty(8, device="cuda"), torch.ones(8)
        try:
            x + on_host
            answer = "nothing"
        except Exception as error:
            answer = str(error)
        """
    )
    assert "same device" in answer and "cpu" in answer and "cuda:0" in answer


def test_what_only_a_device_knows_is_refused():
    answer = _rehearsed(
        """
        from megatron_tropd.rehearsal.tensors import CannotRehearse
        x = torch.empty(8, device="cuda")
        try:
            x[x > 0]
            answer = "nothing"
        except CannotRehearse as error:
            answer = str(error)
        """
    )
    assert "depends on numbers" in answer


@pytest.mark.skipif(not MEASURED.exists(), reason="no measurement of a GPU")
def test_peaks_of_the_losses_are_those_that_a_gpu_had():
    """An H200's allocator, read by benchmarks/loss_gpu.py, beside the same calls on fake tensors."""
    answer = _rehearsed(
        """
        import torch.distributed as dist
        world.join(device, rank=0, world_size=1)
        from loss_cases import Inputs, build, our_cases
        answer = {}
        v, h = 151_936, 4096
        def room(*shape):
            return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
        for tokens in (8192, 32_768):
            leaves = room(tokens, h).requires_grad_(), room(v, h).requires_grad_()
            ids = torch.ones(tokens, dtype=torch.int64, device="cuda")
            uniforms = torch.rand(tokens, device="cuda")
            inputs = Inputs(*leaves, room(tokens, h), room(v, h), ids, uniforms, dist.group.WORLD)
            for case in our_cases():
                if " logits " in case.name:
                    continue
                call = build(case, inputs)
                for leaf in leaves:
                    leaf.grad = None
                before = tracker.current
                with tracker.phase(f"{case.name} {tokens}") as phase:
                    call().backward()
                returned = sum(leaf.grad.nbytes for leaf in leaves)
                answer[f"{case.name} {tokens}"] = (phase.peak - before - returned) / 2**20
        """
    )
    rows = json.loads(MEASURED.read_text())["rows"]
    measured = {f"{row['name']} {row['tokens']}": row["peak_mib"] for row in rows}
    common = measured.keys() & answer.keys()
    assert len(common) >= 18
    for name in common:
        assert answer[name] == pytest.approx(measured[name], rel=1e-3), name
