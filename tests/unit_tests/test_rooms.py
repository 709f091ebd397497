"""One heavy import per room, and dependencies that point one way.

Read from the source, so that imports inside functions count too; then seen in a fresh process,
so that what an import brings along counts as well.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_tropd"

# The rooms each room may import, itself and `errors` aside. `data.types` and `rollout.types` are
# plain records: whoever may not enter the room may still take those.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "text_files": set(),
    "exits": set(),
    "failures": {"exits"},
    "files": set(),
    "token_ids": set(),
    "watchdog": {"exits", "failures"},
    "environment": set(),
    "nodes": {"environment"},
    "deterministic": {"environment"},
    "settings": set(),
    "loss_config": {"settings"},
    "megatron_fields": set(),
    "megatron_config": {"megatron_fields", "settings"},
    "config": {"deterministic", "loss_config", "megatron_config", "settings", "text_files"},
    "losses": {"loss_config"},
    "data": {"config", "files", "losses", "rollout.types", "text_files", "token_ids"},
    "convert": {"config", "files", "text_files", "token_ids"},
    "mcore": {
        *("config", "convert", "data.types", "environment", "files", "losses"),
        *("megatron_config", "megatron_fields", "settings"),
    },
    "rollout": {"config", "convert", "data.types", "exits", "failures", "files", "settings"},
    "tasks": {"config", "convert", "data", "losses", "rollout.types"},
    "report": {"config", "data.types", "files"},
    "planning": {"config", "convert", "settings", "text_files"},
    "cluster": {"config", "settings", "text_files"},
    "rehearsal": {
        *("config", "convert", "data.types", "files", "inputs", "job", "mcore", "planning"),
        *("rollout", "run_folder", "train", "watchdog"),
    },
    "integrations": {
        *("config", "convert", "data", "environment", "loss_config", "losses", "mcore"),
        *("megatron_fields", "rollout", "settings"),
    },
}
OUTSIDE = {
    "megatron": {"mcore", "integrations", "doctor", "rehearsal"},
    "vllm": {"rollout", "doctor"},
}
KERNELS = PACKAGE / "losses" / "dense_triton.py"
TRITON = {KERNELS, PACKAGE / "rehearsal" / "cuda.py"}
"""Who may import triton: where kernels are written, and where their launches are caught."""
LIGHT = {
    *("errors", "exits", "environment", "failures", "files", "token_ids", "watchdog", "nodes"),
    *(
        "deterministic",
        "text_files",
        "settings",
        "loss_config",
        "megatron_fields",
        "megatron_config",
        "config",
    ),
    "cluster",
}
"""Rooms that need the standard library alone."""


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(source: str) -> set[str]:
    """Every module a file imports, at the top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _outside(source: str) -> set[str]:
    """The fenced packages a file imports."""
    return {name.split(".")[0] for name in _imports(source)} & OUTSIDE.keys()


def _imports_triton(source: str) -> bool:
    return any(name.split(".")[0] == "triton" for name in _imports(source))


def _rooms_entered(source: str) -> set[str]:
    """The rooms a file imports, records apart: {"losses", "data.types"}."""
    entered = set()
    for name in _imports(source):
        parts = name.split(".")
        if parts[0] == "megatron_tropd" and len(parts) > 1:
            records = parts[1:3] in (["data", "types"], ["rollout", "types"])
            entered.add(".".join(parts[1:3]) if records else parts[1])
    return entered


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_keeps_to_its_room(path: Path):
    room, source = _room(path), path.read_text()
    for package in _outside(source):
        assert room in OUTSIDE[package], f"{room} may not import {package}"
    if path not in TRITON:
        names = sorted(path.name for path in TRITON)
        assert not _imports_triton(source), f"only {names} may import triton"
    if room in ARROWS:
        allowed = ARROWS[room] | {room, "errors", f"{room}.types"}
        allowed |= {f"{r}.types" for r in ARROWS[room]}
        assert _rooms_entered(source) <= allowed, f"{room} may import {sorted(allowed)} only"


def test_every_room_has_its_arrows():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= ARROWS.keys()


def _loaded(batches: list[list[str]], watched: list[str]) -> list[list[str]]:
    """Which of ``watched`` a fresh Python holds after each batch of imports, in turn."""
    code = (
        "import importlib, json, sys\n"
        "out = []\n"
        f"for names in {batches!r}:\n"
        "    for name in names: importlib.import_module(name)\n"
        f"    out.append([name for name in {watched!r} if name in sys.modules])\n"
        "print(json.dumps(out))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def _modules(rooms: set[str]) -> list[str]:
    paths = [path.relative_to(PACKAGE.parent) for path in FILES if _room(path) in rooms]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_config_needs_the_standard_library_alone():
    heavy = ["torch", "numpy", "transformers", *OUTSIDE]
    assert _loaded([["megatron_tropd"], _modules(LIGHT)], heavy) == [[], []]


def test_imports_bring_nothing_forbidden():
    """vllm enters nowhere: only the engine's own process imports it, when it starts."""
    with_megatron = OUTSIDE["megatron"]
    without = _modules(ARROWS.keys() - with_megatron)
    loaded = _loaded([without, _modules(with_megatron)], list(OUTSIDE))
    assert loaded[0] == []
    assert "vllm" not in loaded[1]


def test_losses_are_imported_without_triton():
    assert _loaded([["megatron_tropd.losses"]], ["triton"]) == [[]]


def test_these_tests_can_fail():
    assert _imports_triton(KERNELS.read_text()) and not _imports_triton("import tritonclient\n")
    source = "def f():\n    import vllm\n    from megatron.core import parallel_state\n"
    assert _outside(source) == {"vllm", "megatron"}
    assert _outside("import megatron_tropd.config\n") == set()
    assert _rooms_entered("from megatron_tropd.data.types import Prompt") == {"data.types"}
    assert _rooms_entered("from megatron_tropd.data import prompts") == {"data"}
    assert _rooms_entered("from megatron_tropd import rollout, config") == {"rollout", "config"}
    assert _loaded([["json"], ["tomllib"]], ["tomllib", "torch"]) == [[], ["tomllib"]]
