"""The container's files: clean for hadolint, the same in both forms, naming what is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
DEFINITION = REPOSITORY / "docker" / "tropd.def"


def _copied() -> set[str]:
    lines = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), re.M)
    return {word for line in lines for word in line.split()}


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    run = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_what_is_copied_is_there_and_not_ignored():
    shown = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.M)
    for name in _copied():
        assert (REPOSITORY / name).exists()
        assert name in shown


def test_both_forms_are_the_same():
    text = DEFINITION.read_text()
    base = re.search(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.M)
    assert base and f"From: {base[1]}\n" in text
    files = text.partition("%files")[2].partition("%post")[0]
    assert {line.split()[0] for line in files.splitlines() if line.strip()} == _copied()


def test_they_say_that_they_were_not_built():
    for path in (DOCKERFILE, DEFINITION, REPOSITORY / "docs" / "container.md"):
        assert "not built yet" in path.read_text().lower(), path.name


def test_the_links_of_the_package_are_copied_too():
    """Else the wheel in the image would lack files that texts name."""
    links = {path.name for path in (REPOSITORY / "megatron_tropd" / "shipped").iterdir()}
    assert links - {"docker"} <= _copied()


@pytest.mark.parametrize("name", ["docker/install.sh", "tools/megatron_versions.sh"])
def test_scripts_are_sound_shell(name: str):
    bash = shutil.which("bash")
    assert bash
    run = subprocess.run([bash, "-n", REPOSITORY / name], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("name", ["docker/install.sh", "tools/megatron_versions.sh"])
def test_shellcheck_has_nothing_to_say_about_scripts(name: str):
    run = subprocess.run(["shellcheck", REPOSITORY / name], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
