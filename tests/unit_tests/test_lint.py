"""The code is clean for ruff and mypy: lint, format, types."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from side_by_side import LONGEST

REPOSITORY = Path(__file__).resolve().parents[2]
STRICT = {
    *("disallow_any_generics", "disallow_incomplete_defs", "disallow_subclassing_any"),
    *("disallow_untyped_calls", "disallow_untyped_decorators", "disallow_untyped_defs"),
    *("extra_checks", "no_implicit_reexport", "strict_equality", "warn_return_any"),
}
"""What mypy's ``--strict`` adds to the settings of all rooms."""


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_code_is_clean(command: str):
    tool, *arguments = command.split()
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    found = subprocess.run(
        [sys.executable, "-m", tool, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert found.returncode == 0, f"make lint:\n{found.stdout}{found.stderr}"


def test_no_two_test_files_have_one_name():
    """They are modules without a package: the second of a name is an error, or the wrong module."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_that_are_to_begin_first_are_there():
    """Workers would not miss one that has another name now."""
    assert [name for name in LONGEST if not (REPOSITORY / name).exists()] == []


def test_the_workflow_runs_what_continuous_integration_runs():
    """And that is the README's command."""
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/test.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    ours = (REPOSITORY / ".ci" / "run").read_text().splitlines()[-1].removeprefix("exec ")
    assert [step["run"] for step in steps] == [ours, "make test-megatron"]
    assert f"\n{ours} " in (REPOSITORY / "README.md").read_text()
    assert "test-megatron:" in (REPOSITORY / "Makefile").read_text()


def test_the_versions_of_megatron_are_the_pinned_one_and_the_one_before():
    script = (REPOSITORY / "tools" / "megatron_versions.sh").read_text()
    (before,) = re.findall(r"^readonly PREVIOUS=0\.(\d+)\.\d+$", script, re.M)
    pins = (REPOSITORY / "constraints" / "cpu.txt").read_text()
    (pinned,) = re.findall(r"^megatron-core==0\.(\d+)\.", pins, re.M)
    assert int(before) == int(pinned) - 1


def test_forms_of_issues_can_be_read():
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"] and form["body"]


@pytest.mark.parametrize("room", ["losses", "config", "data", "distill"])
def test_types_are_strict_where_others_build(room: str):
    """A function without types is refused there, and not only unchecked."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = (each for each in settings["overrides"] if each.get("disallow_untyped_defs"))
    assert f"megatron_tropd.{room}.*" in strict["module"]
    assert strict.keys() - {"module"} >= STRICT
