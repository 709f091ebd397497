"""A fresh machine has no Slurm, no browser, no compiler, no test data: tests are skipped there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import machine
import pytest

TESTS = Path(__file__).resolve().parents[1]


def _found(folders: str) -> set[str]:
    """Which of the optional programs a search path leads to."""
    names = {n for f in folders.split(os.pathsep) if os.path.isdir(f) for n in os.listdir(f)}
    return {
        name
        for name, pattern in machine.PROGRAMS.items()
        if any(map(re.compile(pattern).fullmatch, names))
    }


def test_a_test_finds_only_what_it_asks_for():
    usual = machine.everybody_needs()
    assert _found(os.environ["PATH"]) == usual
    assert usual or not {"CC", "CXX", "CUDA_HOME"} & os.environ.keys()
    assert shutil.which("bash") and shutil.which("sed")


@pytest.mark.needs("compiler")
def test_a_test_finds_what_it_asks_for():
    assert _found(os.environ["PATH"]) == {"compiler"}


def test_a_patched_path_leads_to_the_rest_of_a_folder(tmp_path, monkeypatch):
    real = tmp_path / "bin"
    real.mkdir()
    for name in ("gcc", "x86_64-linux-gnu-g++-12", "sbatch", "chromium", "gccgo-like", "grep"):
        (real / name).write_text("#!/bin/sh\n")
        (real / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}:{tmp_path / 'absent'}")
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.delenv(machine.HIDE, raising=False)
    monkeypatch.setattr(machine, "everybody_needs", frozenset)
    surroundings = machine.Surroundings()
    with surroundings.of(["slurm", "data"]):
        folder, absent = os.environ["PATH"].split(":")
        assert sorted(os.listdir(folder)) == ["gccgo-like", "grep", "sbatch"]
        assert "CC" not in os.environ and absent == str(tmp_path / "absent")
    assert (os.environ["PATH"], os.environ["CC"]) == (f"{real}:{absent}", "gcc")
    surroundings.close()
    assert not Path(folder).exists() and (real / "gcc").exists()


def test_an_unknown_name_to_hide_is_an_error(monkeypatch):
    monkeypatch.setenv(machine.HIDE, "slurm,chrome")
    with pytest.raises(pytest.UsageError, match="names chrome; it knows chromium, compiler, data"):
        machine.hidden_names()


def test_another_folder_of_this_name_is_no_test_data(tmp_path, monkeypatch):
    monkeypatch.setenv("TROPD_TEST_" + "DATA", str(tmp_path))
    monkeypatch.delenv(machine.HIDE, raising=False)
    (tmp_path / "models").mkdir()
    assert "no ['hf-meta', 'tinystories'] at" in machine.why_not("data")
    for name in ("hf-meta", "tinystories"):
        (tmp_path / name).mkdir()
    assert machine.why_not("data") is None


def test_only_one_place_knows_where_the_data_are():
    """And whether there are any: who asks it is skipped."""
    asks = re.compile(r"TROPD_TEST_" + r"DATA|shared/" + r"data|\"shared\"")
    knows = [path.name for path in TESTS.rglob("*.py") if asks.search(path.read_text())]
    assert knows == ["machine.py"]


def test_without_all_of_it_tests_are_skipped():
    """Each that needs something, the whole of tests/slurm among them."""
    asks = re.compile(r"mark\.needs\(|\bshared_data\b")
    files = [str(p) for p in sorted(TESTS.rglob("test_*.py")) if asks.search(p.read_text())]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "needs", "-rs"]
    done = subprocess.run(
        [*command, *files, str(TESTS / "slurm")],
        cwd=TESTS.parent,
        env=os.environ | {machine.HIDE: "all"},
        capture_output=True,
        text=True,
    )
    outcomes = dict(
        (what, int(number))
        for number, what in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])
    )
    assert done.returncode == 0 and outcomes.keys() <= {"skipped", "deselected", "in"}, done.stdout
    assert outcomes["skipped"] > 40
    for name in ("chromium", "compiler", "data", "mount", "slurm"):
        assert f"{name} is hidden by {machine.HIDE}" in done.stdout
