"""The Triton kernels as code for GPUs: every variant compiles, spills nothing and loads widely.

The compiler refuses what the interpreter accepts. Which variants there are is recorded from the
losses themselves (``benchmarks/kernels.py``). All of them were compiled for the committed figures;
here a choice that has every formula, dtype and loop is compiled again.
"""

import importlib.util
import json
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.machine import torch_as_it_was

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Per block (CUDA programming guide, "Technical Specifications per Compute Capability"), of which
# Hopper and Blackwell reserve 1 KiB.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS_OF_A_MULTIPROCESSOR = 65_536
ROWS_OF_ANY_WIDTH = "GPT-2"
"""50,257 columns: no multiple of anything, so that both loops are there and nothing is aligned."""


@pytest.fixture(scope="module")
def kernels():
    """``benchmarks/kernels.py`` as a module."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets, and does not compile")
    spec = importlib.util.spec_from_file_location("kernels", BENCHMARKS / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def committed(kernels):
    """Variant -> target -> figures, as they were written to the repository."""
    result = json.loads(kernels.RESULT.read_text())
    return {row.pop("variant"): row for row in result["rows"]}


@pytest.fixture(scope="module")
def launches(kernels):
    """Every launch at one width; float16 launches what float32 does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "WIDTHS", {"": kernels.WIDTHS[ROWS_OF_ANY_WIDTH]})
        patch.setattr(kernels, "DTYPES", (torch.bfloat16, torch.float32))
        with torch_as_it_was():
            return kernels.recorded()


def _threads(variant: str) -> int:
    return 32 * int(re.search(r"warps=(\d+)", variant)[1])


def test_every_variant_that_is_launched_was_compiled(launches, committed):
    new = launches.keys() - committed.keys()
    assert not new, f"python benchmarks/kernels.py --write compiles {sorted(new)}"
    assert len({name.split()[0] for name in launches}) == 4


def test_no_variant_spills_or_takes_more_than_there_is(committed, kernels):
    for variant, targets in committed.items():
        assert targets.keys() == {f"sm_{target}" for target in kernels.TARGETS}
        for target, limit in SHARED_BYTES.items():
            found = targets[f"sm_{target}"]
            assert found["local_bytes"] == 0, (variant, target, "registers are spilled")
            assert found["shared_bytes"] <= limit, (variant, target)
            threads = _threads(variant)
            assert found["registers"] * threads <= REGISTERS_OF_A_MULTIPROCESSOR, (variant, target)
            # As Triton names the hardware: the "a" is for instructions of this generation alone.
            assert found["arch"] == f"sm_{target}" + ("a" if target >= 90 else "")


def test_whole_blocks_are_loaded_16_bytes_at_a_time_at_every_width(committed):
    """A mask that may end anywhere makes every load one of a single column."""
    seen = 0
    for variant, targets in committed.items():
        if "warps=8" not in variant:  # a block of 2048 columns
            continue
        seen += 1
        for target, found in targets.items():
            whole = found["loops"][0]
            assert whole["loads"].keys() == {"128"}, (variant, target)
            stores = {"128"} if "gradient" in variant else set()
            assert whole["stores"].keys() == stores, (variant, target)
    assert seen > 50


def test_a_mixture_costs_one_logarithm(committed):
    """Each of its forms has one, and a column needs one of the forms.

    Instructions of eight columns with both: 1278 for the sums, 807 for the gradient (sm_90).
    """
    for part, most in (("row_sums_kernel", 700), ("gradient_kernel", 650)):
        loops = [
            targets["sm_90"]["loops"][0]
            for variant, targets in committed.items()
            if variant.startswith(part)
            and "warps=8" in variant
            and "REWARD=mixture" in variant
            # With all metrics there are five sums more.
            and "SMALL_MIX=True" in variant
            and "NUM=7" not in variant
        ]
        assert loops and all(loop["instructions"] < most for loop in loops), part


def _choice(launches):
    """(launch, capability): every formula for sm_90; for the others those with most of them."""
    for name, launch in launches.items():
        settings, ends_anywhere = launch.settings, "columns" in name.partition("|")[2]
        if not (name.startswith("combine") or (ends_anywhere and "warps=8" in name)):
            continue
        # With the gradient in float32 only the stores differ.
        if "gradient" in name and "*bf16" not in name and settings["REWARD"] != "trust_clip":
            continue
        yield launch, 90
        if settings.get("NUM") == 7 or settings.get("TEACHER") or name.startswith("max"):
            yield launch, 80
            yield launch, 100


@pytest.mark.slow
def test_they_compile_to_what_was_committed(kernels, launches, committed, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = json.loads(kernels.RESULT.read_text())
    same_compiler = result["versions"]["triton"] == version("triton")
    formulas = set()
    for launch, capability in _choice(launches):
        code = kernels.compile_for(launch, capability)
        found = kernels.figures(code)
        # The Triton 3.6 beside torch 2.11 spills 8 bytes of the largest kernel.
        assert found["local_bytes"] <= (0 if same_compiler else 64), launch.name
        formulas.add((launch.settings.get("REWARD"), launch.settings.get("TEACHER")))
        # Versions of Triton differ in what they make of it.
        if same_compiler:
            expected = committed[launch.name][f"sm_{capability}"]
            assert found == expected, f"{launch.name}: python benchmarks/kernels.py --write"
        if "row_sums" in launch.name:
            ptx = code.asm["ptx"]
            assert "min.f32" not in ptx and "max.f32" not in ptx, "nan would be passed over"
    assert {"trust", "trust_clip", "log_ratio", "mixture", "power", ""} <= {
        reward for reward, _ in formulas
    }


def test_a_kernel_that_does_not_compile_is_an_error(kernels, launches, monkeypatch, tmp_path):
    """Ptxas refuses it; the interpreter would not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = next(launch for name, launch in launches.items() if name.startswith("combine"))
    settings = launch.settings | {"PIECES": 3}
    wrong = kernels.Launch(launch.kernel, launch.arguments, settings, "wrong")
    with pytest.raises(Exception, match="power of 2"):
        kernels.compile_for(wrong, 90)


@pytest.mark.parametrize("spills", [0, 3])
def test_what_a_driver_says_stands_beside_what_was_compiled(
    kernels, launches, monkeypatch, tmp_path, spills
):
    """With a stand-in for the driver, which reads the registers out of the code."""
    from triton.runtime.driver import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name = next(name for name in launches if name.startswith("combine"))
    registers = kernels.figures(kernels.compile_for(launches[name], 90))["registers"]

    class Driver(kernels._Offline):
        launcher_cls = staticmethod(lambda source, metadata: None)
        utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[90]},
            load_binary=lambda name, code, shared, device: (1, 2, registers, spills, 1024),
        )

        def get_current_device(self):
            return 0

    launches[name].kernel.device_caches.pop(0, None)
    monkeypatch.setattr(driver, "_active", Driver(90))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    (row,) = kernels.loaded({name: launches[name]})["rows"]
    assert row["sm_90"] == {
        "registers": registers,
        "local_bytes": 4 * spills,
        "shared_bytes": 0,
    }
    assert row["as compiled"] == (spills == 0)
