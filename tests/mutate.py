"""Does the suite notice a mistake? Each mutation plants a known one.

    python tests/mutate.py               all mutations, an hour or so
    python tests/mutate.py packing sign  those whose name or file contains one of the words

Package and tests are copied to a temporary folder, the mistake is written into the copy, and the
tests that should notice run on it. Exit code 1 if a mistake goes unnoticed, or if the tests fail
without one. The tables: ``mutate_losses.py``, ``mutate_parts.py``, ``mutate_step.py``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    file: str
    """Below the package."""
    old: str
    """Text that occurs once in the file."""
    new: str
    tests: tuple[str, ...] = ()
    """Those that should notice, below ``tests``."""

    @property
    def path(self) -> str:
        """Of the file in the repository."""
        return f"megatron_tropd/{self.file}"

    def suite(self) -> tuple[str, ...]:
        """Paths of the tests to run on it."""
        return tuple(f"tests/{test}" for test in self.tests)


def of_file(file: str, *rows: tuple[str, str, str, str]) -> tuple[Mutation, ...]:
    """Mutations of one file, each noticed by one test.

    Args:
        file: below the package.
        rows: (name, old, new, test).
    """
    return tuple(
        Mutation(f"{file}: {name}", file, old, new, (test,)) for name, old, new, test in rows
    )


def tables() -> tuple[Mutation, ...]:
    """Every mutation there is."""
    import mutate_losses
    import mutate_parts
    import mutate_step

    return (*mutate_step.MUTATIONS, *mutate_parts.MUTATIONS, *mutate_losses.MUTATIONS)


def source(mutation: Mutation, root: Path = REPOSITORY) -> Path:
    """The file it changes."""
    return (root / mutation.path).resolve()


def places(mutation: Mutation) -> int:
    """How often its text occurs; anything but 1 means that the code has moved on."""
    file = source(mutation)
    return file.read_text().count(mutation.old) if file.exists() else 0


def copy_to(folder: Path) -> None:
    """Package and tests, and what the tests import."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("megatron_tropd", "tests", "slurm"):  # conftest imports the last
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)


def tests_fail(folder: Path, tests: Sequence[str]) -> tuple[bool, str]:
    """Whether the tests fail there, and the line that says how."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return True, "timed out"
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    reasons = [line[1:].strip() for line in found if "Error: " in line]
    return done.returncode == 1, (reasons or found or [""])[0][:120]


def survives(mutation: Mutation) -> bool:
    """Run the tests on a copy with the mistake in it, and say what came of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        path = source(mutation, folder)
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        caught, how = tests_fail(folder, mutation.suite())
    verdict = "caught  " if caught else "SURVIVED"
    print(f"{verdict} {time.monotonic() - begin:4.0f} s  {mutation.name}: {how}", flush=True)
    return not caught


def main(words: list[str]) -> int:
    """Exit code."""
    chosen = [m for m in tables() if not words or any(w in m.name or w in m.path for w in words)]
    moved = [mutation.name for mutation in chosen if places(mutation) != 1]
    if moved or not chosen:
        print(f"Expected text to change exactly once, found otherwise for {moved or words}.")
        return 1
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        failed, how = tests_fail(
            Path(name), list(dict.fromkeys(test for m in chosen for test in m.suite()))
        )
        if failed:
            print(f"The tests fail without a mutation, so they would catch anything: {how}")
            return 1
    alive = [mutation.name for mutation in chosen if survives(mutation)]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} caught; survived: {alive or 'none'}")
    return 1 if alive else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
