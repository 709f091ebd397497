"""The code is clean for ruff and mypy: lint, format, types."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from side_by_side import LONGEST

REPOSITORY = Path(__file__).resolve().parents[2]


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
