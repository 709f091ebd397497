"""One heavy import per room, and dependencies that point one way.

Read from the source, so that imports inside functions count too; then seen in a fresh process,
so that what an import brings along counts as well.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from megatron_tropd import losses

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_tropd"

# The rooms each room may import, itself apart. Arrows point down: no circle.
ARROWS: dict[str, set[str]] = {
    "base": set(),
    "config": {"base"},
    "cluster": {"base", "config"},
    "losses": {"base", "config"},
    "data": {"base", "config", "losses"},
    "convert": {"base", "config"},
    "planning": {"base", "config", "convert"},
    "report": {"base", "config"},
    "mcore": {"base", "config", "convert", "data", "losses"},
    "rollout": {"base", "config", "convert", "data", "losses"},
    "tasks": {"base", "config", "convert", "data", "losses"},
    "teacher": {"base", "config", "convert", "data", "losses", "mcore"},
    "distill": {
        *("base", "config", "convert", "data", "losses", "mcore", "report", "rollout", "tasks"),
        "teacher",
    },
    "integrations": {
        *("base", "config", "convert", "data", "distill", "losses", "mcore", "rollout", "teacher")
    },
    "rehearsal": {
        *("base", "config", "convert", "data", "distill", "losses", "mcore", "planning"),
        *("rollout", "teacher"),
    },
    "launch": {"base", "config", "distill", "mcore", "rollout"},
    "cli": {
        *("base", "cluster", "config", "convert", "data", "distill", "launch", "mcore"),
        *("planning", "rehearsal", "report", "rollout", "tasks", "teacher"),
    },
}
TOP_LEVEL = {"__init__"}
"""Modules beside the rooms."""
OUTSIDE = {
    "megatron": {"mcore", "integrations", "cli", "rehearsal"},
    "vllm": {"rollout", "cli"},
}
KERNELS = PACKAGE / "losses" / "dense_triton.py"
TRITON = {KERNELS, PACKAGE / "rehearsal" / "cuda.py"}
"""Who may import triton: where kernels are written, and where their launches are caught."""
PROGRAMS = ("tests", "benchmarks", "examples", "tools", "slurm")
"""Folders whose programs use the package."""
LIGHT = {"base", "config", "cluster"}
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
    """The rooms a file imports."""
    names = [name.split(".") for name in _imports(source)]
    return {parts[1] for parts in names if parts[0] == "megatron_tropd" and len(parts) > 1}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_source_keeps_to_its_room(path: Path):
    room, source = _room(path), path.read_text()
    for package in _outside(source):
        assert room in OUTSIDE[package], f"{room} may not import {package}"
    if path not in TRITON:
        names = sorted(path.name for path in TRITON)
        assert not _imports_triton(source), f"only {names} may import triton"
    if room not in TOP_LEVEL:
        allowed = ARROWS[room] | {room}
        assert _rooms_entered(source) <= allowed, f"{room} may import {sorted(allowed)} only"


def test_every_room_has_its_arrows():
    assert {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))} == ARROWS.keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP_LEVEL


def test_every_import_of_the_package_finds_its_name():
    """Within functions, too, and in programs that no type checker reads."""
    modules = {_module(path).removesuffix(".__init__"): path for path in FILES}
    names = {module: _top_level(path) for module, path in modules.items()}
    names[losses.__name__] |= set(losses.__all__)  # imported when they are asked for
    outside = (p for folder in PROGRAMS for p in (PACKAGE.parent / folder).rglob("*.py"))
    for path in (*FILES, *outside):
        for node in ast.walk(ast.parse(path.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] != PACKAGE.name:
                continue
            assert module in modules, f"{path} imports {module}, which is not there"
            for name in (alias.name for alias in node.names):
                known = name in names[module] or f"{module}.{name}" in modules
                assert known, f"{path} imports {name} of {module}, which has none"


def _top_level(path: Path) -> set[str]:
    """What a module binds outside of functions and classes."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.alias):
                found.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            else:
                waiting.append(node)
    return found


def test_no_circle():
    """Neither of modules nor of folders; imports in functions and for type checkers count.

    A folder within a room is a room, too, and the modules beside it are another.
    """
    modules = {_module(path): _imports(path.read_text()) for path in FILES}
    graph = {
        name: {found for target in targets if (found := _nearest(target, modules))} - {name}
        for name, targets in modules.items()
    }
    for arrows in (ARROWS, graph, _between_folders(graph)):
        TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def _between_folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows between modules as arrows between the folders that they are in."""
    arrows: dict[str, set[str]] = {}
    for module, targets in graph.items():
        folder = module.rpartition(".")[0]
        arrows.setdefault(folder, set()).update(t.rpartition(".")[0] for t in targets)
    return {folder: targets - {folder} for folder, targets in arrows.items()}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def _nearest(name: str, modules: Collection[str]) -> str | None:
    """The module that ``name`` is or is in; None: outside of the package."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate in modules:
            return candidate
    package = f"{name.rpartition('.')[0]}.__init__"
    return package if package in modules and package != "megatron_tropd.__init__" else None


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
    found = [path for path in FILES if _room(path) in rooms and path.stem != "__main__"]
    paths = [path.relative_to(PACKAGE.parent) for path in found]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_config_needs_the_standard_library_alone():
    heavy = ["torch", "numpy", "transformers", *OUTSIDE]
    assert _loaded([["megatron_tropd"], _modules(LIGHT)], heavy) == [[], []]


def _below(room: str) -> set[str]:
    """The rooms that an import of this one may bring along."""
    return {room}.union(*(_below(other) for other in ARROWS[room]))


def test_imports_bring_nothing_forbidden():
    """Vllm enters nowhere: only the engine's own process imports it, when it starts."""
    with_megatron = {room for room in ARROWS if _below(room) & OUTSIDE["megatron"]}
    without = _modules(ARROWS.keys() - with_megatron)
    loaded = _loaded([without, _modules(with_megatron)], list(OUTSIDE))
    assert loaded[0] == []
    assert "vllm" not in loaded[1]


def test_losses_are_imported_without_triton():
    assert _loaded([["megatron_tropd.losses"]], ["triton"]) == [[]]


def test_these_tests_can_fail():
    assert _imports_triton(KERNELS.read_text()) and not _imports_triton("import tritonclient\n")
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    apart = {"a.one": {"a.b.two"}, "a.b.two": set(), "a.b.three": {"a.four"}, "a.four": set()}
    assert _between_folders(apart) == {"a": {"a.b"}, "a.b": {"a"}}
    source = "def f():\n    import vllm\n    from megatron.core import parallel_state\n"
    assert _outside(source) == {"vllm", "megatron"}
    assert _outside("import megatron_tropd.config\n") == set()
    assert _rooms_entered("from megatron_tropd.data.types import Prompt") == {"data"}
    assert _rooms_entered("from megatron_tropd.data import prompts") == {"data"}
    assert _rooms_entered("from megatron_tropd import rollout, config") == {"rollout", "config"}
    assert _loaded([["json"], ["tomllib"]], ["tomllib", "torch"]) == [[], ["tomllib"]]
