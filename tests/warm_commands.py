"""Commands and ranks of `tropd` for tests, forked from the server that tests/ranks.py uses.

It has imported torch, Megatron and transformers, for which each rank of a command, and the command
itself if it computes, would need four seconds. A command's ranks are forked from it
(``megatron_tropd.launch.forked``) and are its children, so that signals, exit codes and deaths are
those of a command that was started by a shell.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO, TextIOWrapper
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, NoReturn

from forked_process import ForkedProcess

from tests.ranks import PRELOADED


class Command(ForkedProcess):
    """``tropd WORDS`` or a script, with what tests use of ``subprocess.Popen``."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log: IO[str] | None = None,
    ) -> None:
        """Start it as the leader of a session.

        Args:
            words: after ``tropd``; or a script's path and its arguments.
            environment: None: that of this process.
            folder: where; None: that of this process.
            log: for what it prints; None: :meth:`communicate` returns that.
        """
        set_forkserver_preload(PRELOADED)
        environment = os.environ if environment is None else environment
        place = str(folder or Path.cwd())
        self._outputs: list[Connection] = []
        ends = [Connection(os.dup(log.fileno()), readable=False) for _ in range(2)] if log else []
        while len(ends) < 2:
            ours, theirs = Pipe(duplex=False)
            self._outputs.append(ours)
            ends.append(theirs)
        process = get_context("forkserver").Process(
            target=_be, args=(list(map(str, words)), dict(environment), place, *ends)
        )
        process.start()
        for end in ends:
            end.close()
        super().__init__(process, "tropd")

    def send_signal(self, number: int) -> None:
        """Send it a signal; harmless if it has ended."""
        if self.poll() is None:
            assert self.pid
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for it; what it printed to standard output and to standard error."""
        deadline = time.monotonic() + (timeout or 1e5)
        printed = {output: b"" for output in self._outputs}
        with DefaultSelector() as selector:
            for output in self._outputs:
                selector.register(output, EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    output = key.fileobj
                    if chunk := os.read(key.fd, 65536):
                        printed[output] += chunk
                    else:
                        selector.unregister(output)
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("tropd", timeout or 0.0)
        for output in self._outputs:
            output.close()
        self.wait(None if timeout is None else max(0.0, deadline - time.monotonic()))
        out, err = (text.decode(errors="replace") for text in printed.values())
        return out, err


def run(
    words: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    command = Command(words, environment=environment, folder=folder)
    try:
        out, err = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess(list(map(str, words)), command.returncode, out, err)


def has_open(process: Path, folder: Path) -> bool:
    """Whether a process, by its folder in /proc, has a file below ``folder`` open.

    So whoever was forked is found: its command line and its environment are the server's.
    """
    for file in (process / "fd").iterdir():
        with suppress(OSError):
            if os.readlink(file).startswith(f"{folder}/"):
                return True
    return False


def _be(
    words: list[str], environment: dict[str, str], folder: str, out: Connection, err: Connection
) -> NoReturn:
    """Be the command."""
    from megatron_tropd.cli.main import main
    from megatron_tropd.launch import forked

    os.setsid()
    for descriptor, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), descriptor)
        end.close()
    sys.stdout, sys.stderr = (
        TextIOWrapper(FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2)
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _read_path()
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    forked.import_once()
    sys.exit(main(words))


def _read_path() -> None:
    """Do what a new interpreter does with PYTHONPATH: search it first, run what it finds there."""
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = paths
    for path in paths:
        if (site := Path(path, "sitecustomize.py")).exists():
            runpy.run_path(str(site))
