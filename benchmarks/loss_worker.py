"""One row of ``loss.py`` in processes of its own: clock, memory meter, gradient check.

    python benchmarks/loss_worker.py JOB.json RESULT.json RANK

Started by ``loss.py``, once per rank, in this project's environment or in the peers'.

Shape suffixes as in ``loss_cases.py``.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_cases import DIVERGENCES, PRODUCTS, Case, Inputs, all_cases, build, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CHECK = {"tokens": 192, "columns": 2048, "hidden": 64}
"""Size at which gradients are compared with float64: columns are those of one rank."""

# --- The bare products ---------------------------------------------------------------------------

Tile = tuple[int, int]
"""Rows and columns of the logits made at a time."""


class Products:
    """The four matrix products every row needs, in tiles, into memory that is there already."""

    def __init__(self, inputs: Inputs, tile: Tile) -> None:
        """Allocate and touch the outputs."""
        self.inputs, (self.rows, self.columns) = inputs, tile
        self.grad_TH = torch.zeros_like(inputs.hidden_TH)
        self.grad_vH = torch.zeros_like(inputs.weight_vH)
        self.buffers = torch.zeros(2, self.rows * self.columns, dtype=inputs.hidden_TH.dtype)

    @torch.no_grad()
    def __call__(self) -> None:
        """Both forward products, then both backward products with the student's logits."""
        x = self.inputs
        for row in range(0, x.tokens, self.rows):
            t = slice(row, row + self.rows)
            hidden_tH, teacher_tH = x.hidden_TH[t], x.teacher_hidden_TH[t]
            for column in range(0, x.weight_vH.shape[0], self.columns):
                c = slice(column, column + self.columns)
                weight_cH = x.weight_vH[c]
                shape = len(hidden_tH), len(weight_cH)
                size = shape[0] * shape[1]
                student_tc, teacher_tc = (buffer[:size].view(shape) for buffer in self.buffers)
                torch.mm(hidden_tH, weight_cH.t(), out=student_tc)
                torch.mm(teacher_tH, x.teacher_weight_vH[c].t(), out=teacher_tc)
                self.grad_TH[t].addmm_(student_tc, weight_cH, beta=int(column > 0))
                self.grad_vH[c].addmm_(student_tc.t(), hidden_tH, beta=int(row > 0))


def tiles(tokens: int, columns: int) -> list[Tile]:
    """Shapes to try, those that fit: whole rows of the logits, and blocks that stay in a cache."""
    shapes = [(256, columns), (512, columns), (1024, columns), (512, 4096), (1024, 2048)]
    return sorted({(min(rows, tokens), min(width, columns)) for rows, width in shapes})


def fastest_tile(inputs: Inputs, tries: int = 2) -> Tile:
    """The shape in which the products take least; every rank takes rank 0's choice."""
    inputs = first_tokens(inputs, 1024)
    best: dict[Tile, float] = {}
    shapes = tiles(inputs.tokens, inputs.weight_vH.shape[0])
    Products(inputs, shapes[0])()
    for tile in shapes:
        products = Products(inputs, tile)
        best[tile] = min(timed(products, inputs.group) for _ in range(tries))
    choice = [min(best, key=best.__getitem__)]
    dist.broadcast_object_list(choice, src=0, group=inputs.group)
    return choice[0]


def first_tokens(inputs: Inputs, number: int) -> Inputs:
    """The same models at fewer tokens."""
    names = ("hidden_TH", "teacher_hidden_TH", "ids_T", "uniforms_T")
    return replace(inputs, **{name: getattr(inputs, name)[:number] for name in names})


# --- Meters --------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], group: dist.ProcessGroup) -> float:
    """Seconds of a call that all ranks start together."""
    gc.collect()
    dist.barrier(group)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rise(call: Callable[[], Any], *, poll: bool = False) -> int:
    """Bytes by which the resident memory rises at its highest during a call.

    The kernel's high-water mark, set back just before. Where it cannot be set back, or with
    ``poll``, a thread reads the resident memory every millisecond instead.

    Args:
        call: what to watch; its result is kept until the reading.
        poll: never use the high-water mark.

    Returns:
        Bytes over the state before.
    """
    gc.collect()
    return_free_memory()
    before = resident()
    if poll or not reset_high_water_mark():
        with polled_peak() as peak:
            kept = call()
        del kept
        return max(peak) - before
    kept = call()
    status = Path("/proc/self/status").read_text()
    del kept
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - before


def reset_high_water_mark() -> bool:
    """Set VmHWM back to the present. Returns whether this kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def polled_peak() -> Iterator[list[int]]:
    """Watch the resident memory from a thread; the list's maximum is the highest seen."""
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen[:] = [max(seen[0], resident())]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(resident())


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def set_malloc(*, exact: bool) -> None:
    """How glibc's malloc takes memory from the system.

    Args:
        exact: every block of 64 KiB or more is mapped by itself and given back when freed, so
            that the resident memory is the memory in use. Otherwise the values that malloc's own
            adjustment ends at (blocks below 32 MiB are kept for reuse), which are faster.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**16 if exact else 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**16 if exact else 2**26)


def return_free_memory() -> None:
    """Give back what malloc keeps for reuse."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class CountCollectives(TorchDispatchMode):
    """Counts the collectives issued while it is on, however they were called."""

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count and call."""
        if func.namespace == "c10d":
            self.calls[func.__name__.partition(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def forward_backward(row: Callable[[], Tensor], inputs: Inputs) -> None:
    """What is timed: the loss, then the gradients, as a training step makes them."""
    for leaf in inputs.leaves:
        leaf.grad = None
    row().backward()


def measure_call(row: Callable[[], Tensor], inputs: Inputs) -> tuple[int, dict[str, Any]]:
    """Watch one call.

    Args:
        row: what to call; its gradients are those of the inputs' leaves.
        inputs: without gradients so far.

    Returns:
        Peak memory in bytes beyond the inputs and the gradients returned, and the collectives by
        kind, forward and backward.
    """
    counts: dict[str, Any] = {}

    def call() -> None:
        with CountCollectives() as forward:
            loss = row()
        with CountCollectives() as backward:
            loss.backward()
        counts.update(forward=dict(forward.calls), backward=dict(backward.calls))

    for leaf in inputs.leaves:
        leaf.grad = None
    rise = peak_rise(call)
    # Tiny sizes can end below 0: the kernel counts pages, and small blocks were there before.
    return max(rise - sum(leaf.grad.nbytes for leaf in inputs.leaves), 0), counts


# --- Gradients against float64 -------------------------------------------------------------------


def gradient_error(case: Case, group: dist.ProcessGroup, dtype: torch.dtype) -> float:
    r"""Relative L2 distance of a row's gradients from those of the dense float64 definition.

    .. math:: \max_g \lVert g - \hat g \rVert / \lVert \hat g \rVert

    over the gradient of the hidden states and of this rank's shard of the output layer.

    Args:
        case: the row.
        group: the ranks.
        dtype: of the inputs; float64 gets the same rounded values.

    Returns:
        The larger of the two, of the worst rank.
    """
    sizes = CHECK["tokens"], CHECK["columns"], CHECK["hidden"]
    inputs = make_inputs(*sizes, dtype, group)
    measure_call(build(case, inputs), inputs)
    found = [leaf.grad.double() for leaf in inputs.leaves]
    wanted = reference_gradients(case.divergence, inputs)
    errors = [float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]
    return max(every_rank(max(errors), group))


def reference_gradients(divergence: str, inputs: Inputs) -> list[Tensor]:
    """float64 gradients of the hidden states and of this rank's shard."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double()

    hidden_TH = double(inputs.hidden_TH).requires_grad_()
    weights = every_rank(double(inputs.weight_vH), inputs.group)
    weight_VH = torch.cat(weights).requires_grad_()
    teacher_VH = torch.cat(every_rank(double(inputs.teacher_weight_vH), inputs.group))
    log_q_TV = F.log_softmax(hidden_TH @ weight_VH.t(), dim=-1)
    log_p_TV = F.log_softmax(double(inputs.teacher_hidden_TH) @ teacher_VH.t(), dim=-1)
    loss = DIVERGENCES[divergence](log_q_TV, log_p_TV, inputs).mean()
    grad_TH, grad_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return [grad_TH, grad_VH.chunk(inputs.group.size())[inputs.group.rank()]]


def every_rank(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The value of each rank."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


# --- The process ---------------------------------------------------------------------------------


def run_job(job: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """Measure one row.

    Args:
        job: ``name``, ``tokens``, ``columns``, ``hidden``, ``dtype``, ``rounds``, ``tile`` (null:
            find the fastest).
        group: the ranks.

    Returns:
        Its numbers, of the slowest and the largest rank.
    """
    case = next(case for case in all_cases() if case.name == job["name"])
    dtype = getattr(torch, job["dtype"])
    size = job["tokens"], job["columns"], job["hidden"]
    if case.name == PRODUCTS:
        inputs = make_inputs(*size, dtype, group)
        tile = tuple(job["tile"] or fastest_tile(inputs))
        return {"tile": tile, **products_alone(inputs, tile, job["rounds"])}
    # Also the warm-up: what the row, autograd and the meters load at their first use is there
    # before memory is watched, at a size at which anything a row might keep is small.
    set_malloc(exact=True)
    result: dict[str, Any] = {"grad_error": gradient_error(case, group, dtype)}
    inputs = make_inputs(*size, dtype, group)
    row = build(case, inputs)
    if case.compiles:
        forward_backward(row, inputs)
    peak, result["collectives"] = measure_call(row, inputs)
    result["peak"] = max(every_rank(peak, group))
    set_malloc(exact=False)
    return result | seconds_of(row, inputs, tuple(job["tile"]), job["rounds"])


def products_alone(inputs: Inputs, tile: Tile, rounds: int) -> dict[str, Any]:
    """The bare products as a row of their own."""
    products = Products(inputs, tile)
    products()
    seconds = [max(every_rank(timed(products, inputs.group), inputs.group)) for _ in range(rounds)]
    return {
        "seconds": seconds,
        "products": seconds,
        "peak": products.buffers.nbytes,
        "collectives": {"forward": {}, "backward": {}},
    }


def seconds_of(
    row: Callable[[], Tensor], inputs: Inputs, tile: Tile, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the row and of the bare products, in turn, each round's slowest rank."""
    products, group = Products(inputs, tile), inputs.group
    seconds: dict[str, list[float]] = {"products": [], "seconds": []}
    for _ in range(rounds):
        for name, call in (
            ("products", products),
            ("seconds", lambda: forward_backward(row, inputs)),
        ):
            seconds[name].append(max(every_rank(timed(call, group), group)))
    return seconds


def main(job_path: str, result_path: str, rank: str) -> None:
    """Run a job on one rank; rank 0 writes the result.

    Args:
        job_path: JSON written by ``loss.py``.
        result_path: JSON to write.
        rank: of this process.
    """
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(1)
    store = f"file://{job['store']}"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=job["tp"])
    result = run_job(job, dist.group.WORLD)
    if rank == "0":
        Path(result_path).write_text(json.dumps(result))
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()
    # Not through the interpreter's own clearing up: see megatron_tropd.launch.rank.leave (peers'
    # environment has no megatron_tropd).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
