"""Ranks without their imports, for a program that makes many small runs on a CPU.

A rank imports torch, Megatron and transformers for four seconds of a core, which a run of a minute
notices. A program that calls :func:`import_once` does that once for all its runs::

    def run(config: str) -> None:
        forked.import_once()
        raise SystemExit(cli.main.main(["distill", config]))

    forked.import_once()
    for config in configs:
        child = multiprocessing.get_context("fork").Process(target=run, args=(config,))
        child.start()
        child.join()  # child.exitcode is that of the command

The child is a launcher that forks its ranks instead of starting an interpreter for each. They are
its children all the same, each leads a session and dies with it.

A run of its own gains nothing: there, ranks import beside the engine, which takes longer. And never
with a GPU: what libraries look up of it while they are imported does not survive a fork.
"""

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from megatron_tropd.base.exits import FAILED
from megatron_tropd.launch.rank import IMPORTED

_POLL_SECONDS = 0.01
_inherited: frozenset[int] | None = None
"""Descriptors that were open at the last :func:`import_once`; None: it was not called."""


def import_once() -> None:
    """Import what a rank needs; the launcher that this process, or its child, becomes forks ranks.

    A process that has computed anything, or has threads of its own, must not call it. A child calls
    it again, first of all: it takes no time then, and what is opened later is not for the ranks.
    """
    global _inherited
    import_module(IMPORTED)
    _inherited = frozenset(_open_descriptors())


def is_ready() -> bool:
    """Whether :func:`import_once` was called, here or before this process was forked."""
    return _inherited is not None


class ForkedRank:
    """A child that was forked, with what the launcher uses of ``subprocess.Popen``."""

    def __init__(
        self,
        main: Callable[[], NoReturn],
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: int,
        descriptors: Collection[int],
    ) -> None:
        """Fork it, as the leader of a session.

        Args:
            main: what it calls, with ``sys.argv[1:]`` and ``os.environ`` of its own.
            stdin: descriptor of its standard input.
            descriptors: others that it keeps; it loses all that this process has opened meanwhile.
        """
        self.returncode: int | None = None
        begun, begins = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _be(main, arguments, environment, stdin, descriptors)
        os.close(begins)
        with open(begun, "rb") as pipe:
            pipe.read()  # until it leads its session and has let go of what is not its own

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None: it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; harmless if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _be(
    main: Callable[[], NoReturn],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdin: int,
    descriptors: Collection[int],
) -> NoReturn:
    """Be the child, from here to the end of the process."""
    code: object = FAILED
    try:
        os.setsid()
        os.dup2(stdin, 0)
        gc.freeze()  # the launcher's garbage stays: it would close descriptors by their old numbers
        _close_all_but({0, 1, 2, *descriptors, *(_inherited or ())})
        os.environ.clear()
        os.environ.update(environment)
        _use_threads(int(environment["OMP_NUM_THREADS"].split(",")[0]))
        sys.argv = [sys.argv[0], *arguments]
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else FAILED)


def _close_all_but(kept: Collection[int]) -> None:
    for descriptor in set(_open_descriptors()) - set(kept):
        os.close(descriptor)


def _open_descriptors() -> list[int]:
    listed = map(int, os.listdir("/proc/self/fd"))
    return [number for number in listed if Path(f"/proc/self/fd/{number}").is_symlink()]


def _use_threads(count: int) -> None:
    """What a fresh process reads from OMP_NUM_THREADS while it imports torch."""
    import torch

    torch.set_num_threads(count)
