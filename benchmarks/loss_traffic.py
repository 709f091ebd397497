"""What the losses from hidden states read, write, hold and send on a GPU: counted, without one.

    python benchmarks/loss_traffic.py           # Qwen3's vocabulary, H 4096, TP 1 and 8
    python benchmarks/loss_traffic.py --write   # and benchmarks/results/traffic-counted.json

The losses run on fake CUDA tensors and a fake process group, and every operation is counted: what a
kernel must read and write once, whatever caches do, and every collective. Bytes for each token are
differences between two numbers of tokens, so that what is needed once for a chunk or a call drops
out. The unit is v, the columns of a rank: bytes / v of a token.

- ``products``: the four matrix products, operands of size [t, v] only;
- ``kernels``: the Triton passes; ``others``: everything else, top-k included;
- ``bare``: the same products on bfloat16 logits, what ``loss_gpu.py`` divides by;
- ``buffers_mib``: of the logits and the gradient of a chunk, and its rows;
- ``collectives``: of one chunk, with 32-bit words of a token.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.losses import (
    HiddenStatesSignal,
    LossTargets,
    Method,
    chunks,
    dense_triton,
    preset,
    tropd_loss_from_hidden,
)

RESULT = Path(__file__).with_name("results") / "traffic-counted.json"
VOCAB, HIDDEN = 151_936, 4096
ROWS = {
    "OPD": (preset("opd"), False),
    "TrOPD, top-64 forward KL": (preset("tropd"), False),
    "exact TrOPD, top-64 forward KL": (preset("tropd_exact"), False),
    "exact TrOPD, whole vocabulary": (preset("tropd_exact_full"), False),
    "reverse KL": (preset("gkd_reverse_kl"), False),
    "forward KL": (preset("gkd_forward_kl"), False),
    "JSD": (preset("gkd_jsd"), False),
    "exact TrOPD and all metrics": (preset("tropd_exact_full"), True),
}
"""Name -> (settings, metrics)."""
PRODUCTS = ("mm", "addmm")
_WORDS = 4


def main() -> None:
    """Count, print, and write if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", nargs="?", const=str(RESULT), metavar="PATH")
    options = parser.parse_args()
    result = {
        "what": "traffic of the losses from hidden states on a GPU, counted and not measured",
        "versions": {"torch": version("torch")},
        "vocab": VOCAB,
        "hidden": HIDDEN,
        "dtype": "bfloat16",
        "rows": [row for size in (1, 8) for row in rows_of(size)],
    }
    print(table(result))
    if options.write:
        Path(options.write).write_text(json.dumps(result, indent=1) + "\n")


def rows_of(size: int) -> list[dict[str, Any]]:
    """Every row at one tensor-parallel size, seen by rank 0."""
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        return [row_of(name, *settings, size) for name, settings in ROWS.items()]
    finally:
        if size > 1:
            dist.destroy_process_group()


def row_of(name: str, config: Method, metrics: bool, size: int) -> dict[str, Any]:
    """Figures of one loss."""
    columns, rows = VOCAB // size, count(config, metrics, size, 2**16).chunk_rows
    few, more = (count(config, metrics, size, number * rows) for number in (2, 4))
    grown = {
        part: (more.bytes[part] - few.bytes[part]) / (2 * rows) / columns
        for part in ("products", "kernels", "others")
    }
    return {
        "name": name,
        "tensor_parallel": size,
        "bytes_of_a_token_over_v": {part: round(value, 2) for part, value in grown.items()}
        | {"all": round(sum(grown.values()), 2), "bare": bare_products()},
        "passes": {name: number // 4 for name, number in Counter(more.kernels).items()},
        "chunk_rows": rows,
        "buffers_mib": round(more.buffer_bytes / 2**20),
        "collectives": more.collectives_of_a_chunk(),
    }


def bare_products() -> float:
    """bfloat16 logits of both models written, those of the student read by two products."""
    return 2.0 * (2 + 2)


class Traffic(TorchDispatchMode):
    """Counts what every operation reads and writes, and every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels: list[str] = []
        self.collectives: list[tuple[str, int]] = []
        self.chunk_rows = 0
        self.buffer_bytes = 0
        self.tokens = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and do it."""
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        if name.startswith("c10d."):
            self._collective(name, args)
            return result
        name = name.removeprefix("aten.")
        if not _is_view(name):
            read = _distinct([args, {k: v for k, v in (kwargs or {}).items() if k != "out"}])
            written = _distinct(result)
            part = "products" if name.split(".")[0] in PRODUCTS else "others"
            self.bytes[part] += _moved(name, read, written, products=part == "products")
        return result

    def _collective(self, name: str, args: Any) -> None:
        # Torch has several operations for each.
        kinds = {"allgather": "all-gather", "allreduce": "all-reduce"}
        kind = next((kinds[part] for part in kinds if part in name), name)
        # Outputs of a gather are named first: what this rank sends is the last tensor.
        sent = [x for x in tree_leaves(args) if isinstance(x, Tensor)][-1]
        self.collectives.append((kind, sent.nbytes))

    def launch(self, name: str, tensors: list[Tensor]) -> None:
        """A Triton kernel; each of its tensors is read or written once."""
        self.kernels.append(name.strip("_").removesuffix("_kernel"))
        self.bytes["kernels"] += sum(_size(x) for x in _distinct(tensors))

    def collectives_of_a_chunk(self) -> list[dict[str, Any]]:
        """Kind and words of a token of each; without those of a call."""
        there = self.tokens // self.chunk_rows
        return [
            {"kind": kind, "words": round(size / _WORDS / self.chunk_rows, 2)}
            for (kind, size), times in Counter(self.collectives).items()
            for _ in range(times // there)
        ]


def _is_view(name: str) -> bool:
    if name.startswith(("empty", "detach", "lift", "_unsafe_view", "new_empty", "prim.")):
        return True
    return name.split(".")[0] in {
        *("view", "slice", "transpose", "t", "expand", "unsqueeze", "squeeze", "select", "alias"),
        *("split", "split_with_sizes", "unbind", "permute", "as_strided", "reshape"),
    }


def _distinct(tree: Any) -> list[Tensor]:
    found: dict[Any, Tensor] = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            key = (leaf.untyped_storage()._cdata, leaf.storage_offset(), tuple(leaf.shape))
            found[key] = leaf
    return list(found.values())


def _size(tensor: Tensor) -> int:
    # A row that is expanded is read once.
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.itemsize


def _moved(name: str, read: list[Tensor], written: list[Tensor], *, products: bool) -> int:
    if name.startswith(("gather", "scatter", "index")):
        # A few columns of a row, not the row.
        return 3 * 8 * min(x.numel() for x in [*read, *written])
    if name.startswith("new_"):
        read = []
    tensors = [*read, *written]
    if products:  # operands and results of [t, v]; hidden states and weights are the bare products'
        tensors = [x for x in tensors if x.dim() == 2 and HIDDEN not in x.shape]
    return sum(_size(x) for x in tensors)


@contextmanager
def _counting() -> Iterator[Traffic]:
    """Fake CUDA tensors whose operations and kernels are counted."""
    traffic = Traffic()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return self._launch

        def _launch(self, *arguments: Any, **_: Any) -> None:
            traffic.launch(self.name, [x for x in arguments if isinstance(x, Tensor)])

    made = chunks._Buffers.__init__

    def noted(buffers: Any, *arguments: Any, **settings: Any) -> None:
        made(buffers, *arguments, **settings)
        traffic.chunk_rows = buffers._rows
        parts = [buffers._logits, buffers._rounded]
        traffic.buffer_bytes = sum(x.untyped_storage().nbytes() for x in parts if x is not None)

    kernels = {name: Counted(name) for name in vars(dense_triton) if name.endswith("_kernel")}
    with (
        FakeTensorMode(),
        patch.multiple(dense_triton, **kernels),
        patch.object(chunks._Buffers, "__init__", noted),
        patch.object(torch.cuda, "device_of", lambda tensor: nullcontext()),
    ):
        yield traffic


def count(config: Method, metrics: bool, size: int, tokens: int) -> Traffic:
    """One call on rank 0 of ``size``."""
    columns = VOCAB // size
    with _counting() as traffic:
        traffic.tokens = tokens
        states = torch.empty(2, tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(2, columns, HIDDEN, dtype=torch.bfloat16, device="cuda")
        targets = LossTargets(
            ids_T=torch.empty(tokens, dtype=torch.int64, device="cuda"),
            is_teacher_T=torch.empty(tokens, dtype=torch.bool, device="cuda"),
            uniforms_T=torch.empty(tokens, device="cuda"),
        )
        leaves = states[0].requires_grad_(), weights[0].requires_grad_()
        with traffic:
            tropd_loss_from_hidden(
                *leaves,
                targets,
                HiddenStatesSignal(states[1], weights[1], VOCAB),
                config=config,
                vocab_size=VOCAB,
                group=dist.group.WORLD if size > 1 else None,
                metrics=metrics,
            )
    return traffic


def table(result: dict[str, Any]) -> str:
    """A line for each row."""
    return "\n".join(
        f"{row['name']:32} TP {row['tensor_parallel']}  {row['bytes_of_a_token_over_v']}  "
        f"chunk {row['chunk_rows']} rows, {row['buffers_mib']} MiB  passes {row['passes']}  "
        f"{row['collectives']}"
        for row in result["rows"]
    )


if __name__ == "__main__":
    main()
