"""tools/setup_env.sh with interpreters that refuse, lack parts, or are missing (nothing installed).

The interpreters are shell scripts, and so are the pip and uv they "install".
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "chmod", "cksum", "cp", "dirname", "env", "grep", "head", "ls", "mkdir")

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) echo {version} ;;
    *ensurepip*) exit {ensurepip} ;;
    "-m venv --clear "*)
        echo "venv by $0" >>"$LOG"
        mkdir -p "$4/bin"; cp "$0" "$4/bin/python"
        printf '#!/bin/sh\\necho "uv $*" >>"$LOG"; exit ${{UV_EXIT:-0}}\\n' >"$4/bin/uv"
        chmod +x "$4/bin/uv" ;;
    "-m pip "*) ;;
esac
"""


class Machine:
    """A checkout, a PATH and a home folder to put interpreters in."""

    def __init__(self, root: Path) -> None:
        """Copy what the script reads; give it the tools it needs and no Python."""
        self.checkout, self.path, self.home = root / "checkout", root / "bin", root / "home"
        self.log = root / "log"
        for folder in (self.checkout / "tools", self.path, self.home):
            folder.mkdir(parents=True)
        shutil.copy(REPOSITORY / "tools" / "setup_env.sh", self.checkout / "tools")
        shutil.copy(REPOSITORY / "pyproject.toml", self.checkout)
        shutil.copytree(REPOSITORY / "constraints", self.checkout / "constraints")
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool) or tool)

    def python(self, path: Path, version: str = "3.12", ensurepip: int = 0) -> Path:
        """Put a fake interpreter somewhere."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.format(version=version, ensurepip=ensurepip))
        path.chmod(0o755)
        return path

    def script(self, name: str, text: str) -> None:
        """Put a shell script on PATH."""
        (self.path / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.path / name).chmod(0o755)

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script as a user would."""
        environment = {"PATH": str(self.path), "HOME": str(self.home), "LOG": str(self.log)}
        return subprocess.run(
            ["bash", "tools/setup_env.sh"],
            cwd=self.checkout,
            env=environment | variables,
            capture_output=True,
            text=True,
        )

    def done(self) -> list[str]:
        """What the fake interpreters and uv did since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine without Python."""
    return Machine(tmp_path)


def test_no_python_says_what_to_install(machine: Machine):
    run = machine.run()
    assert run.returncode == 1
    assert "no working Python 3.12 or 3.13" in run.stderr and "apt-get install" in run.stderr
    assert not (machine.checkout / ".venv").exists()


def test_refusing_shim_is_passed_over_for_a_version_that_works(machine: Machine):
    machine.script("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    machine.python(machine.path / "python3", version="3.11")
    real = machine.python(machine.home / ".pyenv/versions/3.12.1/bin/python")
    run = machine.run()
    assert run.returncode == 0, run.stderr
    assert machine.done()[0] == f"venv by {real}"


def test_shim_hides_a_good_python_further_down_the_path(machine: Machine):
    machine.script("python3.12", "exit 127")
    real = machine.python(machine.home / "usr/bin/python3.12")
    run = machine.run(PATH=f"{machine.path}:{real.parent}")
    assert run.returncode == 0, run.stderr
    assert machine.done()[0] == f"venv by {real}"


def test_python_without_venv_names_the_package(machine: Machine):
    machine.python(machine.path / "python3.13", version="3.13", ensurepip=1)
    run = machine.run()
    assert run.returncode == 1 and "apt-get install python3.13-venv" in run.stderr


def test_named_python_must_work(machine: Machine):
    old = machine.python(machine.path / "old", version="3.10")
    run = machine.run(PYTHON=str(old))
    assert run.returncode == 1 and "not a working Python 3.12 or 3.13" in run.stderr


def test_second_call_does_nothing_until_something_changes(machine: Machine):
    machine.python(machine.path / "python3.12")
    assert machine.run().returncode == 0
    first = machine.done()
    assert len(first) == 2 and "--constraint constraints/cpu.txt" in first[1]
    assert (
        "--overrides constraints/overrides.txt" in first[1] and ".[cpu,tasks,dev,docs]" in first[1]
    )
    assert machine.run().returncode == 0
    assert machine.done() == []
    with (machine.checkout / "constraints" / "cpu.txt").open("a") as file:
        file.write("another==1\n")
    assert machine.run().returncode == 0
    assert [line.split()[0] for line in machine.done()] == ["uv"], "updated in place"


def test_interrupted_installation_is_gone_on_with(machine: Machine):
    machine.python(machine.path / "python3.12")
    assert machine.run(UV_EXIT="1").returncode == 1
    machine.done()
    assert machine.run().returncode == 0
    assert [line.split()[0] for line in machine.done()] == ["uv"]


def test_device_takes_the_gpu_extra_and_a_new_environment(machine: Machine):
    machine.python(machine.path / "python3.12")
    assert machine.run().returncode == 0
    machine.done()
    machine.script("nvidia-smi", "echo 'GPU 0: a device'")
    assert machine.run().returncode == 0
    venv, install = machine.done()
    assert venv.startswith("venv by") and ".[gpu,tasks,dev,docs]" in install
    assert "--constraint constraints/gpu.txt" in install and "--overrides" not in install


def test_moved_checkout_gets_a_new_environment(machine: Machine):
    machine.python(machine.path / "python3.12")
    assert machine.run().returncode == 0
    machine.done()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.run().returncode == 0
    assert machine.done()[0].startswith("venv by")


def test_unknown_extra_is_refused(machine: Machine):
    run = machine.run(TROPD_EXTRA="tpu")
    assert run.returncode == 1 and "cpu or gpu" in run.stderr


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_constraints_are_full_pins_without_addresses(name: str):
    lines = (REPOSITORY / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        package, equals, version = pin.partition("==")
        assert package and equals and version and not set(pin) & set("@/;: "), pin
    assert len(pins) == len({pin.partition("==")[0].lower() for pin in pins}) > 100


def test_the_script_is_executable():
    for name in ("tools/setup_env.sh", ".ci/run"):
        assert os.access(REPOSITORY / name, os.X_OK)
