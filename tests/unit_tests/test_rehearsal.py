"""A step on fake tensors: what it counts, what it notices, and that it agrees with real ones.

A process that rehearses believes in a GPU until it ends, so one is started that runs the programs
of all these tests, one after the other.
"""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "losses-gpu-1x-nvidia-h200.json"
_PRELUDE = """
import gc, json, sys
sys.path[:0] = [{root!r}, {benchmarks!r}]
import torch
from megatron_tropd.rehearsal import cuda, world
from megatron_tropd.rehearsal.events import Events, line_running
from megatron_tropd.rehearsal.memory import Tracker
from megatron_tropd.rehearsal.tensors import Device, known
device = Device(Tracker(line_running), Events())
cuda.believe(device, gpus=8)
answers = {{}}
with device:
    for name, code in json.load(sys.stdin).items():
        tracker, events = device.tracker, device.events
        tracker.forget_phases(); events.take()
        found = dict(globals())
        exec(code, found)
        answers[name] = found.pop("answer")
        del found
        gc.collect()
print(json.dumps(answers))
"""


_PROGRAMS: dict[str, str] = {}


def program(code: str) -> Callable[[Any], Any]:
    """Give a test what ``code`` leaves in ``answer``, in a process that believes in a GPU."""

    def register(test: Any) -> Any:
        _PROGRAMS[test.__name__] = textwrap.dedent(code)
        return test

    return register


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of every program, by the name of its test."""
    prelude = _PRELUDE.format(root=str(ROOT), benchmarks=str(ROOT / "benchmarks"))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude],
        input=json.dumps(_PROGRAMS),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answers


@pytest.fixture
def answer(request: pytest.FixtureRequest, answers: dict[str, Any]) -> Any:
    """Of the test's own program."""
    return answers[request.function.__name__]


@program(
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
def test_a_known_program_has_its_known_peaks(answer):
    one = 2**20
    assert answer["one"] == [8 * one, 3 * one]  # a view holds the whole storage
    assert answer["two"] == [4 * one, 4 * one]
    assert answer["rounded"] == [one + 1024, one + 1024]
    assert answer["now"] == one + 1024


@program(
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
def test_autograd_keeps_what_it_keeps_on_a_gpu(answer):
    """Of a product both factors, of a fused norm its input and one number a row."""
    assert answer[0] == 1024 * 512 * 2 + 1024 * 4
    assert 0 <= answer[1] - (1024 * 8 * 64 * 2 + 1024 * 8 * 4) <= 4096  # and two random states
    assert answer[2:] == ["cuda:0", True, "torch.cuda.BFloat16Tensor"]


@program(
    """
    from megatron_tropd.distill import metrics as step_metrics
    from megatron_tropd.mcore import student
    import inspect
    source = inspect.getsource(student.broken_gradients)
    model = torch.nn.Linear(4, 4, device="cuda")
    for parameter in model.parameters():
        parameter.main_grad = parameter.detach().clone()
    student.broken_gradients(dict(model.named_parameters()))
    first = inspect.getsourcelines(student.broken_gradients)[1]
    line = first + next(
        n for n, text in enumerate(source.splitlines()) if "isfinite" in text
    )
    answer = [[w.what, w.line, n] for w, n in events.waits.items()] + [line]
    """
)
def test_a_planted_wait_is_found_with_its_line(answer):
    """In the source of a module of ours, through the trainer's own call."""
    *waits, line = answer
    assert waits == [["item", f"megatron_tropd/mcore/student.py:{line}", 2]]


@program(
    """
    x = torch.empty(8, device="cuda")
    mask = (torch.arange(8, device="cuda") % 2 == 0)
    x[mask]; mask.nonzero(); x.sum().item(); x.cpu(); x.tolist(); float(x[0])
    torch.cuda.synchronize(); torch.tensor([1.0], device="cuda"); bool(mask.any())
    torch.ones(3).to("cuda", non_blocking=True)
    answer = [sorted([w.what, n] for w, n in events.waits.items()), list(x[mask].shape)]
    """
)
def test_every_kind_of_wait_is_noted(answer):
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


@program(
    """
    x, on_host = torch.empty(8, device="cuda"), torch.ones(8)
    try:
        x + on_host
        answer = "nothing"
    except Exception as error:
        answer = str(error)
    """
)
def test_a_mix_of_devices_fails(answer):
    assert "same device" in answer and "cpu" in answer and "cuda:0" in answer


@program(
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
def test_what_only_a_device_knows_is_refused(answer):
    assert "depends on numbers" in answer


@program(
    """
    import torch.distributed as dist
    world.believe(device)
    world.join(rank=0, world_size=1)
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
def test_peaks_of_the_losses_are_those_that_a_gpu_had(answer):
    """An H200's allocator, read by benchmarks/loss_gpu.py, beside the same calls on fake ones."""
    rows = json.loads(MEASURED.read_text())["rows"]
    measured = {f"{row['name']} {row['tokens']}": row["peak_mib"] for row in rows}
    common = measured.keys() & answer.keys()
    assert len(common) >= 18
    for name in common:
        assert answer[name] == pytest.approx(measured[name], rel=1e-3), name
