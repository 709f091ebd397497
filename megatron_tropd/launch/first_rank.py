"""The first rank of a node does the imports for all of them.

torch, Megatron and transformers take seconds to import, more where a network file system is slow.
The launcher imports none of them. It starts one process, which imports them, checks what the run
reads, forks the other ranks of its node, and goes on as a rank itself. Both sides are in this file;
they speak JSON lines over a socket pair.

A forked rank is the launcher's own child like the first (``PR_SET_CHILD_SUBREAPER``): in a session
of its own, waited for by the launcher, dying with it. Forks are made of a process that has done
nothing but imports. Where that is not so (a GPU was asked for, a library has started threads), the
launcher starts the other ranks one by one.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, Self

from megatron_tropd.base import exits
from megatron_tropd.base.environment import STORE_DESCRIPTOR
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.config import Config, config_from_dict, config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch.parent import die_with
from megatron_tropd.rollout.engines import process

_SET_CHILD_SUBREAPER = 36  # of prctl
PRELOADED = (
    "megatron_tropd.distill.loop",
    "megatron_tropd.launch.rank",
)
"""What every rank imports before its first step, with all that these import."""


class Rank(Protocol):
    """What the launcher needs of a rank, as of ``subprocess.Popen``."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def terminate(self) -> None: ...


def kill_session(leader: int) -> None:
    """Kill the process that leads a session, and what it started in it; harmless if it is gone.

    Args:
        leader: its process id. To the system 1 would mean every process, 0 the caller's own group.
    """
    if leader <= 1:
        raise ValueError(f"Expected the process id of a child, found {leader}; nothing was killed.")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class ForkedRank:
    """A child that somebody else forked; as much of ``subprocess.Popen`` as a :class:`Rank` has."""

    def __init__(self, pid: int) -> None:
        """``pid``: a child of this process."""
        self.pid = pid
        self.returncode: int | None = None
        """Exit code, minus the signal that ended it; None: it runs."""

    def poll(self) -> int | None:
        """Look whether it has ended; its exit code if so."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        code = self._wait(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        """Send SIGTERM if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class FirstRank:
    """The launcher's side. A context manager: a process that did not become a rank is killed."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        engine_threads: int = 0,
        shown: str = "",
        listener: socket.socket | None = None,
    ) -> None:
        """Start it: its imports begin now.

        Args:
            environment: of the first rank, as far as it is known; libraries read it while they
                are imported.
            engine_threads: CPU threads of the engine that it will own; 0: none is prepared.
            shown: ends the command line of the process and of those it forks, for ``ps``.
            listener: where the ranks will meet, if it becomes rank 0; closed with this.
        """
        self.listener = listener
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        console = [os.dup(1), os.dup(2)]
        passed = [theirs.fileno(), *console]
        numbers = [os.getpid(), engine_threads, *passed]
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, numbers), shown],
            env=environment,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[*passed, *([listener.fileno()] if listener else [])],
            start_new_session=True,
        )
        for descriptor in console:
            os.close(descriptor)
        theirs.close()
        self._lines = ours.makefile("rw")
        ours.close()
        self._is_rank = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_rank:
            kill_session(self.process.pid)
            self.process.wait()
        with contextlib.suppress(OSError):
            self._lines.close()
        self._output.close()
        if self.listener is not None:
            self.listener.close()

    def wait_ready(self) -> None:
        """Wait until its imports are done, or it has ended."""
        self._ask({"check": None})

    def check(self, config: Config) -> int:
        """Whether the inputs of ``config`` are usable (``inputs.load_inputs``).

        Returns:
            0, or the exit code of an error that nobody foresaw, whose traceback was printed.

        Raises:
            ConfigError, InputError: they are not.
            TrainingError: they cannot be read now, or the process was killed.
        """
        answer = self._ask({"check": config_to_dict(config)})
        if answer is None:
            if (code := self.process.wait()) >= 0:
                return exits.FAILED
            raise TrainingError(
                f"The first rank of this node was killed by {signal.Signals(-code).name} before "
                "the run began. Start the same command again. (SIGKILL without a reason in the "
                "logs: often the node ran out of memory.)",
                kind="killed",
            )
        if "error" in answer:
            raise _as_error(answer["error"], answer["message"])
        return answer["code"]

    def run(self, folder: RunFolder, places: Sequence[Mapping[str, str]]) -> list[Rank]:
        """Let it become a rank of the run in ``folder``, and fork the others if it can.

        Args:
            folder: an opened run folder.
            places: environment variables that differ between ranks, or were unknown so far: one
                set for each rank of this node.

        Returns:
            All ranks, or the first alone.
        """
        self._is_rank = True
        with _adopting() as adopting:
            answer = self._ask(
                {"run": str(folder.root), "places": list(map(dict, places)), "fork": adopting}
            )
        return [self.process, *map(ForkedRank, answer["pids"] if answer else [])]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Its answer; None: it has ended, and what it printed was shown."""
        with contextlib.suppress(OSError, ValueError):
            self._lines.write(json.dumps(request) + "\n")
            self._lines.flush()
            return json.loads(self._lines.readline())
        self.process.wait()
        self._output.seek(0)
        print(self._output.read().decode(errors="replace"), end="", file=sys.stderr, flush=True)
        self._output.truncate(0)
        return None


@contextmanager
def _adopting() -> Iterator[bool]:
    """Become the parent of what the children of this process leave behind; false: impossible."""
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1):
        yield False
        return
    try:
        yield True
    finally:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 0)


def _as_error(kind: str, message: str) -> Exception:
    known = {"config": ConfigError, "input": InputError}
    return known[kind](message) if kind in known else TrainingError(message, kind=kind)


# The side of the process.


def main() -> NoReturn:
    """Import, answer the launcher, become a rank."""
    launcher, engine_threads, link, *console = map(int, sys.argv[1:-1])
    die_with(launcher)
    if engine_threads:
        process.prepare(engine_threads)
    _import()
    lines = socket.socket(fileno=link).makefile("rw")
    while "check" in (request := _read(lines)):
        settings = request["check"]
        answer = _check(config_from_dict(settings), console) if settings else {}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
    folder, (mine, *others) = Path(request["run"]), request["places"]
    pids: list[int] = []
    if request["fork"] and _can_fork():
        gc.freeze()  # collecting garbage would copy what is shared
        for place in others:
            become = partial(_become_other, folder, place, console, lines, mine)
            pid = _fork_for(launcher, become)
            if pid is None:
                break  # the launcher starts the rest
            pids.append(pid)
    lines.write(json.dumps({"pids": pids}) + "\n")
    lines.flush()
    _keep_output(folder, int(mine["RANK"]))
    _become(folder, mine, console, lines)


def _import() -> None:
    # numpy's OpenBLAS starts its threads at once; torch's, if any, keeps the user's number.
    given = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import_module("numpy")
    del os.environ["OPENBLAS_NUM_THREADS"]
    if given is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = given
    for module in PRELOADED:
        import_module(module)


def _read(lines: IO[str]) -> dict[str, Any]:
    line = lines.readline()
    if not line:
        sys.exit(exits.RESTART)  # the launcher is gone
    return json.loads(line)


def _can_fork() -> bool:
    import torch

    return len(os.listdir("/proc/self/task")) == 1 and not torch.cuda.is_available()


def _check(config: Config, console: Sequence[int]) -> dict[str, Any]:
    """What comes of reading the inputs, in a process of its own: it leaves threads behind."""
    if not _can_fork():
        return _outcome(config)
    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        die_with(parent)
        _print_to(console)
        os.write(writer, json.dumps(_outcome(config)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if text:
        return json.loads(text)
    return {"code": exits.RESTART if code < 0 else exits.FAILED}


def _outcome(config: Config) -> dict[str, Any]:
    from megatron_tropd.base.failures import kind_of
    from megatron_tropd.distill.inputs import load_inputs
    from megatron_tropd.mcore.options_check import check_options

    try:
        inputs = load_inputs(config)
        check_options(config, student=inputs.student.config, teacher=inputs.teacher.config)
    except BaseException as error:
        kind = kind_of(error)
        if kind in ("config", "input", "disk"):
            return {"error": kind, "message": str(error)}
        traceback.print_exc()
        sys.stderr.flush()
        return {"code": exits.FAILED}
    return {"code": exits.COMPLETE}


def _fork_for(launcher: int, become: Callable[[], NoReturn]) -> int | None:
    """Fork a process that is no child of this one but of the launcher, its adopted orphan.

    Returns:
        Its number, once it has a session of its own and dies with the launcher; None: it is gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        between = os.getpid()
        if os.fork():
            os._exit(0)
        os.close(reader)
        try:
            _belong_to(launcher, between)
            os.write(writer, str(os.getpid()).encode())
            os.close(writer)
            become()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(exits.FAILED)
    os.close(writer)
    os.waitpid(between, 0)
    with open(reader) as file:
        text = file.read()
    return int(text) if text else None


def _belong_to(launcher: int, between: int) -> None:
    os.setsid()
    while os.getppid() == between:
        time.sleep(0.001)
    die_with(launcher)  # or end, if it adopts nobody


def _print_to(console: Sequence[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, descriptor in enumerate(console, 1):
        os.dup2(descriptor, number)


def _keep_output(folder: Path, rank: int) -> None:
    """Put what the imports printed into the rank's log."""
    from megatron_tropd.launch.rank import log_file

    sys.stdout.flush()
    sys.stderr.flush()
    os.lseek(1, 0, os.SEEK_SET)
    with contextlib.suppress(OSError), log_file(RunFolder(folder), rank).open("ab") as log:
        while block := os.read(1, 65536):
            log.write(block)


def _become_other(
    folder: Path,
    place: Mapping[str, str],
    console: Sequence[int],
    lines: IO[str],
    of_first: Mapping[str, str],
) -> NoReturn:
    process.leave_to_parent()
    if STORE_DESCRIPTOR in of_first:  # else others would find a port that nobody answers
        os.close(int(of_first[STORE_DESCRIPTOR]))
    _become(folder, place, console, lines)


def _become(
    folder: Path, place: Mapping[str, str], console: Sequence[int], lines: IO[str]
) -> NoReturn:
    from megatron_tropd.launch.rank import work

    lines.close()
    os.environ.update(place)
    _print_to(console)
    for descriptor in console:
        os.close(descriptor)
    work(RunFolder(folder))


if __name__ == "__main__":
    main()
