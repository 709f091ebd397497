"""The pinned environments: every pin fits what asks for it. Read from files, without a network.

That the pins resolve to exactly themselves is checked by hand when one moves:
``uv pip compile pyproject.toml --extra gpu --extra dev -c constraints/gpu.txt``.
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ("cpu", "gpu")
FAMILY = {
    "torch": "2.13",
    "torchvision": "0.28",
    "torchaudio": "2.11",
    "triton": "3.7",
}
"""What vLLM 0.32.0 asks for together. torchaudio 2.11 is built on torch's stable interface and
serves later versions of torch: its number stands still. All four were imported together."""
DIFFER = {"apache-tvm-ffi", "cuda-bindings", "setuptools"}
"""vLLM's two builds ask for other versions of these."""


def _pins(environment: str) -> dict[str, str]:
    lines = (REPOSITORY / "constraints" / f"{environment}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in found), "constraints pin"
    assert [name for name, _ in found] == sorted({name for name, _ in found})
    return {name: number for name, number in found}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_torch_and_what_is_built_on_it_are_of_one_family(environment):
    pins = _pins(environment)
    for name, family in FAMILY.items():
        if name in pins:
            assert pins[name].startswith(f"{family}."), name
    if environment == "gpu":
        assert pins.keys() >= FAMILY.keys()
        assert pins["vllm"] == "0.32.0", "another vLLM asks for another family: see its METADATA"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_pins_are_what_the_project_asks_for(environment):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = _pins(environment)
    asked = [extras[name] for name in (environment, "train", "serve", "tasks", "dev", "docs")]
    for text in [*project["dependencies"], *(text for extra in asked for text in extra)]:
        wanted = Requirement(text)
        if wanted.name == project["name"]:
            continue  # extras within extras
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text


def test_the_two_environments_agree():
    cpu, gpu = map(_pins, ENVIRONMENTS)
    differ = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert differ == DIFFER


def test_benchmarks_compare_on_the_same_torch():
    torch = _pins("cpu")["torch"]
    for path in (REPOSITORY / "benchmarks").glob("requirements-*.txt"):
        found = re.findall(r"^torch==(\S+)$", path.read_text(), re.MULTILINE)
        assert found == [torch], path.name
