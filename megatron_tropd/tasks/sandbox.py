"""Runs a program that a model wrote, by tests, in a process with limits.

What is limited: wall and processor time, memory, the size of each file it writes, its environment
(no variable of ours) and, where the system lets an ordinary user have them, its network and the
processes that it leaves (namespaces of their own). What is not: how many processes it has until its
time is up; and it may read what the user may read, and write where the user may write. Run models
that you do not trust in a container.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from megatron_tropd.base.errors import InputError

_OUTPUT_BYTES = 2**24
_FENCED = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_STARTED = b"started"
_LIMITED = f"""
import os, resource, sys
seconds, memory, size, told = (int(value) for value in sys.argv[1:5])
for what, most in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
):
    resource.setrlimit(what, (most, most))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
os.write(told, {_STARTED!r})
os.close(told)
os.execv(sys.executable, [sys.executable, "-I", sys.argv[5]])
"""


class SandboxError(Exception):
    """The program could not be run at all."""


@dataclass(frozen=True)
class Tests:
    """What a program must do."""

    code: str = ""
    """Python that runs after it and raises if it is wrong."""
    cases: tuple[tuple[str, str], ...] = ()
    """What it reads, and what it must write."""


def tests_of(answer: Any) -> Tests:
    """Read the tests of a problem.

    Args:
        answer: Python as text, a list of such lines, {"inputs": [...], "outputs": [...]}, or JSON
            of such a table.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(answer, str) and answer.lstrip().startswith("{"):
        with suppress(ValueError):
            answer = json.loads(answer)
    if isinstance(answer, dict):
        inputs, outputs = answer.get("inputs"), answer.get("outputs")
        if _are_texts(inputs) and _are_texts(outputs) and len(inputs) == len(outputs):
            return Tests(cases=tuple(zip(inputs, outputs, strict=True)))
    elif _are_texts(answer):
        return Tests(code="\n".join(answer))
    elif isinstance(answer, str) and answer.strip():
        return Tests(code=answer)
    raise InputError(
        'grader.name = "code" expects tests as "answer": Python that raises, a list of such lines, '
        f'or {{"inputs": [...], "outputs": [...]}} of texts, found {answer!r:.60}.'
    )


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def code_of(response: str) -> str:
    """Find the program in a response: the last block of Python, else the last block, else all."""
    blocks = _FENCED.findall(response)
    python = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [response])[-1]


def passes(code: str, tests: Tests, *, seconds: float, memory_mib: int) -> bool:
    """Whether a program does what its tests ask, each within the limits.

    Raises:
        SandboxError: it could not be started.
        OSError: there is no room for it.
    """
    if tests.code:
        # A program that ends before its tests does not print this.
        proof = secrets.token_hex(16)
        program = f"{code}\n\n{tests.code}\n\nprint()\nprint({proof!r})\n"
        output = run_program(program, "", seconds=seconds, memory_mib=memory_mib)
        return output is not None and output.rstrip().endswith(proof)
    for given, wanted in tests.cases:
        output = run_program(code, given, seconds=seconds, memory_mib=memory_mib)
        if output is None or _lines(output) != _lines(wanted):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_program(program: str, given: str, *, seconds: float, memory_mib: int) -> str | None:
    """Run a program with some input.

    Returns:
        What it wrote; None if it failed or exceeded a limit.

    Raises:
        SandboxError: it could not be started.
    """
    # What a program left behind may write while its folder is removed.
    with tempfile.TemporaryDirectory(prefix="tropd-grade-", ignore_cleanup_errors=True) as folder:
        path, output = Path(folder) / "program.py", Path(folder) / "output"
        path.write_text(program, encoding="utf-8", errors="replace")
        limits = [int(seconds) + 1, memory_mib * 2**20, _OUTPUT_BYTES]
        with output.open("wb") as written:
            code = _wait(path, limits, given, written, seconds)
        if code != 0 or output.stat().st_size >= _OUTPUT_BYTES:
            return None
        return output.read_text(encoding="utf-8", errors="replace")


def _wait(
    path: Path, limits: Sequence[int], given: str, written: BinaryIO, seconds: float
) -> int | None:
    """Run it to its end, or end it with all that it started.

    Returns:
        Its exit code; None if time ran out.

    Raises:
        SandboxError: what sets its limits ended before it could start it.
    """
    read, told = os.pipe()  # closed before the program begins, which so cannot write into it
    with open(read, "rb") as said, tempfile.TemporaryFile() as errors:
        command = [*_apart(), sys.executable, "-I", "-c", _LIMITED, *map(str, [*limits, told])]
        try:
            process = subprocess.Popen(
                [*command, str(path)],
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=errors,
                cwd=path.parent,
                env=_environment(path.parent),
                pass_fds=(told,),
                start_new_session=True,
            )
        finally:
            os.close(told)
        in_time = _ends(process, given, seconds)
        if said.read() != _STARTED:
            errors.seek(0)
            lines = errors.read(4096).decode(errors="replace").split("\n")
            why = next(filter(None, reversed(lines)), f"not within {seconds:g} s")
            raise SandboxError(f"a program could not be started: {why}")
    return process.returncode if in_time else None


def _ends(process: subprocess.Popen[bytes], given: str, seconds: float) -> bool:
    """Whether it ends in time; it and its group are ended in any case."""
    try:
        process.communicate(given.encode(errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return True


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of ours."""
    own = str(folder)
    return {"PATH": os.defpath, "HOME": own, "TMPDIR": own, "OMP_NUM_THREADS": "1"}


@lru_cache
def _apart() -> tuple[str, ...]:
    """The command that gives a program a network and processes of its own; empty without one."""
    for command in (
        ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
        ("unshare", "--map-root-user", "--net"),
    ):
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if tried.returncode == 0:
            return command
    return ()


def network_is_off() -> bool:
    """Whether programs run here without a network."""
    return "--net" in _apart()
