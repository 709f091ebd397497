"""The Triton kernels of the losses, compiled ahead of time: registers, shared memory, spills.

    python benchmarks/kernels.py              # a table; no GPU is needed
    python benchmarks/kernels.py --write      # and benchmarks/results/kernels-compiled.json
    python benchmarks/kernels.py --loaded     # on a GPU: the same figures as its driver gives them

Which kernels are compiled, and for which arguments, is not written down here. The losses
themselves run on fake CUDA tensors (nothing is computed), for every preset, dtype and width below,
and what they launch is recorded (:func:`recorded`). Triton then specialises the recorded arguments
as it does in a launch, and compiles them for sm_80, sm_90 and sm_100.

- ``registers``, ``local_bytes`` (stack and spills) and ``shared_bytes`` of a program's threads:
  ``cuobjdump -res-usage`` of the compiled code;
- ``whole`` and ``loops``: of the disassembled code and of each loop in it the ``instructions``,
  those of the unit for exponentials and reciprocals among them (``mufu``), and ``loads`` and
  ``stores`` of global memory by the bits that a thread moves at once. The first loop is over whole
  blocks, eight columns a thread; the second over what is left.

ptxas, cuobjdump and nvdisasm come with Triton.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from megatron_tropd.losses import (
    PRESETS,
    FullSignal,
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    Method,
    ReferencedSignal,
    TeacherSignal,
    dense_triton,
    preset,
    tropd_loss,
    tropd_loss_from_hidden,
)

RESULT = Path(__file__).with_name("results") / "kernels-compiled.json"
TARGETS = {80: "A100", 90: "H100, H200", 100: "B200"}
"""Compute capabilities. Triton compiles 90 and 100 for sm_90a and sm_100a, as on the hardware."""
WIDTHS = {
    "Qwen3": 151_936,
    "Qwen3, not padded": 151_669,
    "Qwen3 on 8 ranks": 18_992,
    "GPT-2": 50_257,
    "one piece": 16_384,
    "tiny": 259,
}
"""Columns of a rank. What a kernel is compiled for follows from their size and divisors."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
CONFIGS = (
    *map(preset, PRESETS),
    preset("tropd_exact", outlier="clip", tau=-1.0),
    preset("gkd_jsd", jsd_beta=0.9),
)
"""The presets, and what settings add to the code of a kernel."""
TOKENS, HIDDEN = 48, 64


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel, as Triton tells them apart."""

    kernel: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    name: str
    """Kernel, constants, and which arguments are not multiples of 16."""


def main() -> None:
    """Compile, print, and write where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", nargs="?", const=str(RESULT), metavar="PATH")
    parser.add_argument("--loaded", action="store_true", help="load them on this GPU instead")
    options = parser.parse_args()
    if options.loaded and not torch.cuda.is_available():
        raise SystemExit(
            "--loaded needs a GPU. Without it the kernels are compiled and not loaded."
        )
    launches = recorded()
    result = loaded(launches) if options.loaded else compiled(launches)
    print(table(result))
    if options.write:
        Path(options.write).write_text(as_text(result))


# --- What the losses launch ----------------------------------------------------------------------


def recorded() -> dict[str, Launch]:
    """Every variant that the losses launch for the presets, dtypes and widths above, by name."""
    launches: dict[str, Launch] = {}
    with _on_fake_gpu(launches):
        for width in WIDTHS.values():
            for config in CONFIGS:
                for dtype in DTYPES:
                    _from_hidden(config, dtype, width, metrics=False)
                # Metrics change the sums, and not what they are made of.
                _from_hidden(config, DTYPES[0], width, metrics=True)
                _from_logits(config, width)
    return dict(sorted(launches.items()))


@contextmanager
def _on_fake_gpu(launches: dict[str, Launch]) -> Iterator[None]:
    """CUDA tensors without data or device; kernels put what they get into ``launches``."""
    kernels = {name: kernel for name, kernel in vars(dense_triton).items() if _is_kernel(name)}
    recorders = {name: _Recorder(kernel, launches) for name, kernel in kernels.items()}
    with (
        FakeTensorMode(),
        patch.multiple(dense_triton, **recorders),
        # It asks the driver, of which there may be none.
        patch.object(torch.cuda, "device_of", lambda tensor: nullcontext()),
    ):
        yield


def _is_kernel(name: str) -> bool:
    return name.endswith("_kernel")


class _Recorder:
    """In a kernel's place: keeps what it would be launched with."""

    def __init__(self, kernel: Any, launches: dict[str, Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **settings: Any) -> None:
        arguments = tuple(_Pointer(x) if isinstance(x, Tensor) else x for x in arguments)
        name = variant_name(self.kernel, arguments, settings)
        self.launches.setdefault(name, Launch(self.kernel, arguments, settings, name))


class _Pointer(MockTensor):  # type: ignore[misc]
    """A tensor as Triton's compiler sees it: a dtype, and whether its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype)
        # CUDA's allocator aligns by 512 bytes.
        self.address = tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:  # type: ignore[override]
        """Address within the allocation."""
        return self.address


def variant_name(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> str:
    """What Triton tells variants of a kernel apart by, as one readable line."""
    with offline(90):
        binder = kernel.device_caches[driver.active.get_current_device()][-1]
        bound, specialised, _ = binder(*arguments, **settings)
    parts = [kernel.__name__.strip("_"), f"warps={settings['num_warps']}"]
    unaligned = []
    for name, (kind, detail) in zip(bound, specialised, strict=True):
        if kind == "constexpr":
            parts += [f"{name}={detail}"] if name in settings else [f"{name} is {detail}"]
        elif kind.startswith("*") and kind != "*fp32":
            parts.append(f"{name}:{kind}")
        if kind != "constexpr" and kind != "fp32" and detail != "D":
            unaligned.append(name)
    return " ".join(parts) + (f" | not x16: {' '.join(unaligned)}" if unaligned else "")


def _from_hidden(config: Method, dtype: torch.dtype, width: int, *, metrics: bool) -> None:
    states = torch.empty(2, TOKENS, HIDDEN, dtype=dtype, device="cuda")
    weights = torch.empty(2, width, HIDDEN, dtype=dtype, device="cuda")
    signal = HiddenStatesSignal(states[1], weights[1], width)
    tropd_loss_from_hidden(
        states[0].requires_grad_(),
        weights[0].requires_grad_(),
        _targets(config),
        _signal(signal, config),
        config=config,
        vocab_size=width,
        group=None,
        metrics=metrics,
    )


def _from_logits(config: Method, width: int) -> None:
    """The forward pass, and that of its backward: autograd does not serve fake CUDA tensors."""
    student, teacher = torch.empty(2, TOKENS, width, device="cuda").unbind(0)
    signal = LogitsSignal(teacher, width)
    output = tropd_loss(
        *(student.requires_grad_(), _targets(config), _signal(signal, config)),
        config=config,
        vocab_size=width,
        group=None,
    )
    node: Any = output.loss_T.grad_fn
    type(node)._forward_cls.backward(node, torch.empty_like(output.loss_T))


def _signal(signal: FullSignal, config: Method) -> TeacherSignal:
    """The teacher's, as its own reference for a loss that reads one."""
    return ReferencedSignal(signal, signal) if config.needs.reference else signal


def _targets(config: Method) -> LossTargets:
    golden = config.needs.golden
    return LossTargets(
        ids_T=torch.empty(TOKENS, dtype=torch.int64, device="cuda"),
        is_teacher_T=torch.empty(TOKENS, dtype=torch.bool, device="cuda"),
        uniforms_T=torch.empty(TOKENS, device="cuda"),
        rollout_logprobs_T=torch.empty(TOKENS, device="cuda"),
        is_golden_T=torch.empty(TOKENS, dtype=torch.bool, device="cuda") if golden else None,
    )


# --- What the compiler makes of it ---------------------------------------------------------------


class _Offline:
    """What Triton asks of a driver before it compiles; a device of its own for each target."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """The GPU that code is made for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """What Triton keeps compiled code by; no real device has such a number."""
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        """The default one; nothing runs on it."""
        return 0


@contextmanager
def offline(capability: int) -> Iterator[None]:
    """Triton believes in a GPU of this capability until the block ends."""
    # Not set_active and reset_active: the latter looks for a real driver, and there may be none.
    with patch.object(driver, "_active", _Offline(capability)):
        yield


def compile_for(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for one capability, not loaded.

    Args:
        launch: one of :func:`recorded`.
        capability: key of :data:`TARGETS`, or another that Triton knows.

    Returns:
        ``asm`` has the code in every form, ``metadata`` what a launch needs.

    Raises:
        Exception: whatever Triton or ptxas says of a kernel that they refuse.
    """
    with offline(capability):
        return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.settings)


def figures(code: Any) -> dict[str, Any]:
    """What a compiled kernel takes and does; the names are explained at the top.

    Args:
        code: of :func:`compile_for`.

    Returns:
        For the result's file.
    """
    arch = re.findall(r"^\.target (\w+)", code.asm["ptx"], re.MULTILINE)[0]
    return {"arch": arch, "shared_bytes": code.metadata.shared} | _read(code.asm["cubin"])


def _read(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "local_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "whole": _count(code),
        "loops": [_count(body) for body in _loops(code)],
    }


def _loops(code: str) -> Iterator[str]:
    """What lies between a label and a jump back to it."""
    for label in re.finditer(r"^(\.L_x_\d+):$", code, re.MULTILINE):
        jumps = re.finditer(rf"\bBRA\b.*{re.escape(label[1])}\)", code)
        ends = [jump.end() for jump in jumps if jump.start() > label.end()]
        # The last instruction of all jumps to itself.
        if ends and code.count("\n", label.end(), ends[-1]) > 2:
            yield code[label.end() : ends[-1]]


def _count(code: str) -> dict[str, Any]:
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.MULTILINE)
    return {
        "instructions": sum(name != "NOP" for name in operations),
        "mufu": sum(name.startswith("MUFU") for name in operations),
        "loads": _widths(operations, "LDG"),
        "stores": _widths(operations, "STG"),
    }


def _widths(operations: list[str], kind: str) -> dict[str, int]:
    """How many accesses to global memory there are of each width in bits."""
    widths = {"64": "64", "128": "128", "U16": "16", "U8": "8"}
    found = Counter(
        next((widths[part] for part in parts if part in widths), "32")
        for operation in operations
        if (parts := operation.split("."))[0] == kind
    )
    return dict(sorted(found.items()))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.backends.nvidia.__file__).with_name("bin") / name  # type: ignore[attr-defined]
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@cache
def why_not() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    if "nvidia" not in triton.backends.backends:
        return "this Triton has no compiler for NVIDIA GPUs"
    folder = Path(triton.backends.nvidia.__file__).with_name("bin")  # type: ignore[attr-defined]
    names = ("ptxas", "ptxas-blackwell", "cuobjdump", "nvdisasm")
    lacking = [name for name in names if not (folder / name).is_file()]
    return f"this Triton comes without {', '.join(lacking)}" if lacking else None


def compiled(launches: dict[str, Launch]) -> dict[str, Any]:
    """Figures of every variant for every target."""
    if reason := why_not():
        raise SystemExit(f"Nothing can be compiled: {reason}.")
    rows = []
    for number, launch in enumerate(launches.values(), 1):
        print(f"\r{number} of {len(launches)}", end="", file=sys.stderr, flush=True)
        found = {f"sm_{target}": figures(compile_for(launch, target)) for target in TARGETS}
        rows.append({"variant": launch.name} | found)
    print(file=sys.stderr)
    return _result("compiled, not run", rows)


def loaded(launches: dict[str, Launch]) -> dict[str, Any]:
    """Registers and spills of every variant as this GPU's driver gives them, beside ptxas's own."""
    major, minor = torch.cuda.get_device_capability()
    rows, capability = [], 10 * major + minor
    for launch in launches.values():
        code = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.settings)
        code._init_handles()
        found = {
            "registers": code.n_regs,
            "local_bytes": 4 * code.n_spills,
            "shared_bytes": code.metadata.shared,
        }
        ahead = figures(compile_for(launch, capability))
        same = all(found[name] == ahead[name] for name in found)
        rows.append({"variant": launch.name, f"sm_{capability}": found, "as compiled": same})
    return _result(f"loaded on {torch.cuda.get_device_name()}", rows)


def _result(what: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": f"Triton kernels of the losses, {what}",
        "versions": {name: version(name) for name in ("torch", "triton")},
        "widths": WIDTHS,
        "rows": rows,
    }


def as_text(result: dict[str, Any]) -> str:
    """JSON with a line for each variant."""
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    rows = ",\n".join(map(json.dumps, result["rows"]))
    return head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n]\n}}\n'


def table(result: dict[str, Any]) -> str:
    """One line for each variant and target."""
    lines = [result["what"]]
    for row in result["rows"]:
        lines.append(row["variant"])
        lines += [f"  {key}: {value}" for key, value in row.items() if key != "variant"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
