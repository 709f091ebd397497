"""Time and memory of the losses from hidden states on one GPU, beside the bare matrix products.

    python benchmarks/loss_gpu.py             # a table
    python benchmarks/loss_gpu.py --write     # and benchmarks/results/losses-<hardware>.json
    python benchmarks/loss_gpu.py --quick     # small sizes: does everything run?

Every row goes from bfloat16 hidden states and output layers of student and teacher to the
gradients of the student's two, as a training step does, at the vocabulary of Qwen3 and the width of
an 8B student. Rows and products take turns, ``--rounds`` times; each figure is a median of CUDA
events.

- ``ratio``: seconds over those of the four products every row needs (logits of both models,
  gradients of hidden states and weight, in bfloat16), in the fastest of several tilings;
- ``peak_mib``: rise of the allocator's peak beyond inputs and returned gradients;
- ``grad_error``: relative L2 distance of the gradients from the dense float64 definition, at a
  small size;
- ``kernels``: each Triton pass over one chunk, in bytes a second beside a device copy;
- ``plain``: the same row with plain torch in place of the kernels (``TROPD_PLAIN=1``).
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_cases import DIVERGENCES, Case, Inputs, build, make_inputs, our_cases
from step import commit, describe_hardware
from torch import Tensor

from megatron_tropd.losses import dense_triton
from megatron_tropd.losses.dense import SUMS, DenseSpec, RowCoefficients, Scratch

RESULTS = Path(__file__).with_name("results")
VOCAB, HIDDEN, TOKENS = 151_936, 4096, (8192, 32_768)
QUICK = {"vocab": 8192, "hidden": 256, "tokens": [1024], "rounds": 2}
CHECK = {"tokens": 192, "vocab": 2048, "hidden": 64}
KERNEL_ROWS = 1024
PLAIN_ROWS = ("ours hidden exact tropd",)
TARGET = 1.25
"""Aim of the exact rows' ratio."""


def main() -> None:
    """Measure, print, and write where asked."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU; benchmarks/loss.py is the one for CPUs.")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        result = measure(options)
        dist.destroy_process_group()
    print(table(result))
    if options.write is not None:
        path = Path(options.write or RESULTS / f"losses-{describe_hardware()[0]}.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Written: {path.name}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="T")
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"V (default {VOCAB})")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"H (default {HIDDEN})")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls (default 5)")
    parser.add_argument("--rows", default="", help="only rows whose name this pattern finds")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--write", nargs="?", const="", metavar="PATH", help="write the result")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    cases = [
        case
        for case in our_cases()
        if case.name.startswith("ours hidden") and re.search(options.rows, case.name)
    ]
    errors = {
        case.name: {kind: gradient_error(case, getattr(torch, kind)) for kind in DTYPES}
        for case in cases
    }
    rows = []
    for tokens in options.tokens:
        rows += measure_size(cases, tokens, options)
    for row in rows:
        row["grad_error"] = errors[row["name"]]
    return {
        "what": "losses from hidden states on one GPU, bfloat16",
        "hardware": describe_hardware()[1],
        "versions": {name: version(name) for name in ("torch", "triton")},
        **commit(),
        "time": time.strftime("%Y-%m-%d"),
        "settings": {k: v for k, v in vars(options).items() if k != "write"},
        "target": {"ratio of the exact rows": TARGET},
        "rows": rows,
        "kernels": kernel_rates(options.vocab),
    }


DTYPES = ("float32", "bfloat16")


def measure_size(
    cases: list[Case], tokens: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every row at one number of tokens."""
    inputs = inputs_on_gpu(tokens, options.vocab, options.hidden)
    tile = fastest_tile(inputs)
    rows = []
    for case in cases:
        rows.append(measure_row(case, inputs, tile, options.rounds))
        print(line(rows[-1]), flush=True)
        if case.name in PLAIN_ROWS:
            with plain_torch():
                slow = measure_row(case, inputs, tile, options.rounds)
            rows[-1]["plain"] = {name: slow[name] for name in ("seconds", "ratio", "peak_mib")}
    return rows


def measure_row(case: Case, inputs: Inputs, tile: int, rounds: int) -> dict[str, Any]:
    """Seconds of a row and of the products in turn, and the row's peak."""
    row = build(case, inputs)

    def call() -> None:
        for leaf in inputs.leaves:
            leaf.grad = None
        row().backward()

    call()
    peak = peak_of(call, inputs)
    products = Products(inputs, tile)
    products()
    times: dict[str, list[float]] = {"row": [], "products": []}
    for _ in range(rounds):
        times["products"].append(seconds(products))
        times["row"].append(seconds(call))
    ratios = [a / b for a, b in zip(times["row"], times["products"], strict=True)]
    unit = 4 * inputs.tokens * inputs.vocab / 2**20
    return {
        "name": case.name,
        "tokens": inputs.tokens,
        "vocab": inputs.vocab,
        "hidden": inputs.hidden_TH.shape[1],
        "seconds": statistics.median(times["row"]),
        "products_seconds": statistics.median(times["products"]),
        "products_rows": tile,
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "peak_mib": peak / 2**20,
        "peak_u": peak / 2**20 / unit,
    }


def seconds(call: Callable[[], None]) -> float:
    """Seconds of a call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_of(call: Callable[[], None], inputs: Inputs) -> int:
    """Bytes of the allocator's peak beyond the inputs and the gradients returned."""
    for leaf in inputs.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    rise = torch.cuda.max_memory_allocated() - before
    return rise - sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)


class Products:
    """The four matrix products every row needs, ``rows`` tokens at a time."""

    def __init__(self, inputs: Inputs, rows: int) -> None:
        """Allocate the outputs."""
        self.inputs, self.rows = inputs, min(rows, inputs.tokens)
        self.grad_TH = torch.empty_like(inputs.hidden_TH)
        self.grad_vH = torch.empty_like(inputs.weight_vH)
        shape = (2, self.rows, inputs.weight_vH.shape[0])
        self.logits = torch.empty(shape, dtype=inputs.hidden_TH.dtype, device="cuda")

    @torch.no_grad()
    def __call__(self) -> None:
        """Both forward products, then both backward products with the student's logits."""
        x = self.inputs
        for begin in range(0, x.tokens, self.rows):
            t = slice(begin, min(begin + self.rows, x.tokens))
            student_tv, teacher_tv = self.logits[:, : t.stop - t.start]
            torch.mm(x.hidden_TH[t], x.weight_vH.t(), out=student_tv)
            torch.mm(x.teacher_hidden_TH[t], x.teacher_weight_vH.t(), out=teacher_tv)
            torch.mm(student_tv, x.weight_vH, out=self.grad_TH[t])
            self.grad_vH.addmm_(student_tv.t(), x.hidden_TH[t], beta=int(begin > 0))


def fastest_tile(inputs: Inputs) -> int:
    """Rows at which the products take least."""
    best: dict[int, float] = {}
    for rows in (1024, 2048, 4096, 8192, 16_384):
        if rows > inputs.tokens:
            continue
        products = Products(inputs, rows)
        products()
        best[rows] = min(seconds(products) for _ in range(3))
        del products
    return min(best, key=best.__getitem__)


def inputs_on_gpu(tokens: int, vocab: int, hidden: int) -> Inputs:
    """Two correlated models as in ``loss_cases``, drawn on the device: a CPU takes a minute."""
    draw = torch.Generator(device="cuda").manual_seed(1)

    def pair(rows: int, scale: float) -> tuple[Tensor, Tensor]:
        first, noise = torch.randn(2, rows, hidden, generator=draw, device="cuda") * scale
        teacher = 0.9 * first + 0.44 * noise
        return first.to(torch.bfloat16).requires_grad_(), teacher.to(torch.bfloat16)

    hidden_TH, teacher_TH = pair(tokens, 1.0)
    weight_vH, teacher_vH = pair(vocab, 3.0 / hidden**0.5)
    ids_T = torch.randint(vocab, (tokens,), generator=draw, device="cuda")
    uniforms_T = torch.rand(tokens, generator=draw, device="cuda")
    assert dist.group.WORLD is not None
    models = hidden_TH, weight_vH, teacher_TH, teacher_vH
    return Inputs(*models, ids_T, uniforms_T, dist.group.WORLD)


def gradient_error(case: Case, dtype: torch.dtype) -> float:
    """Worst relative L2 distance of the two gradients from the dense float64 definition."""
    assert dist.group.WORLD is not None
    sizes = CHECK["tokens"], CHECK["vocab"], CHECK["hidden"]
    cpu = make_inputs(*sizes, dtype, dist.group.WORLD)
    moved = {
        name: value.detach().cuda().requires_grad_(value.requires_grad)
        for name, value in vars(cpu).items()
        if isinstance(value, Tensor)
    }
    inputs = replace(cpu, **moved)
    build(case, inputs)().backward()
    wanted = reference(case.divergence, cpu)
    pairs = zip((leaf.grad for leaf in inputs.leaves), wanted, strict=True)
    return max(
        float((grad.double().cpu() - right).norm() / right.norm())
        for grad, right in pairs
        if grad is not None
    )


def reference(divergence: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """float64 gradients of the two leaves."""
    hidden_TH, weight_VH = (x.detach().double().requires_grad_() for x in inputs.leaves)
    teacher_TV = inputs.teacher_hidden_TH.double() @ inputs.teacher_weight_vH.double().t()
    log_q_TV = F.log_softmax(hidden_TH @ weight_VH.t(), dim=-1)
    loss = DIVERGENCES[divergence](log_q_TV, F.log_softmax(teacher_TV, dim=-1), inputs).mean()
    return torch.autograd.grad(loss, (hidden_TH, weight_VH))


@contextmanager
def plain_torch() -> Iterator[None]:
    """No kernels."""
    os.environ["TROPD_PLAIN"] = "1"
    try:
        yield
    finally:
        del os.environ["TROPD_PLAIN"]


def kernel_rates(vocab: int) -> dict[str, Any]:
    """Gigabytes a second of each pass over one chunk, counting what it must read and write."""
    shape = (KERNEL_ROWS, vocab)
    student_Tv, teacher_Tv = (3 * torch.randn(shape, device="cuda") for _ in range(2))
    out_Tv, scratch = torch.empty_like(student_Tv), Scratch(vocab, student_Tv.device)
    norms = [
        torch.stack([x.amax(-1), (x - x.amax(-1, keepdim=True)).exp().sum(-1).log()], -1)
        for x in (student_Tv, teacher_Tv)
    ]
    factors = RowCoefficients(*torch.randn(3, KERNEL_ROWS, device="cuda").unbind(0))
    spec, one = DenseSpec(SUMS, "trust", reward_floor=-2.5, mix=0.5), student_Tv.nbytes
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (2 * one, lambda: out_Tv.copy_(student_Tv)),
        "max_and_sum_exp": (one, lambda: dense_triton.max_and_sum_exp(student_Tv, scratch)),
        "row_sums": (
            2 * one,
            lambda: dense_triton.row_sums(student_Tv, teacher_Tv, *norms, spec, scratch),
        ),
        "write_gradient": (
            3 * one,
            lambda: dense_triton.write_gradient(
                student_Tv, teacher_Tv, *norms, factors, spec, scratch, out_Tv
            ),
        ),
        "topk 64": (one, lambda: student_Tv.topk(64, dim=-1)),
        "cast to bfloat16": (one + one // 2, lambda: student_Tv.to(torch.bfloat16)),
    }
    rates = {}
    for name, (size, call) in calls.items():
        call()
        took = statistics.median(seconds(call) for _ in range(10))
        rates[name] = {"milliseconds": 1e3 * took, "gb_per_second": size / took / 1e9}
    return {"rows": KERNEL_ROWS, "columns": vocab, "passes": rates}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{row['name']:46} T {row['tokens']:6}  {1e3 * row['seconds']:8.1f} ms  "
        f"ratio {row['ratio']:.3f}  peak {row['peak_mib']:8.0f} MiB = {row['peak_u']:.3f} u"
    )


def table(result: dict[str, Any]) -> str:
    """What is printed at the end."""
    lines = [line(row) for row in result["rows"]]
    for row in result["rows"]:
        if "plain" in row:
            lines.append(f"plain torch: {row['name']}, T {row['tokens']}: {row['plain']}")
    for name, rate in result["kernels"]["passes"].items():
        lines.append(f"{name:20} {rate['milliseconds']:8.2f} ms {rate['gb_per_second']:8.0f} GB/s")
    errors = {row["name"]: row["grad_error"] for row in result["rows"]}
    lines += [f"gradient error {name:46} {error}" for name, error in errors.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
