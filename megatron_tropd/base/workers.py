"""Processes in which code of others runs: JSON requests in, one reply each, within limits.

Graders (:mod:`megatron_tropd.tasks.grading`) and environments
(:mod:`megatron_tropd.rollout.environments`) run in them. What such code prints goes nowhere; one
that dies, hangs or floods is a :class:`WorkerError` of whoever asked.

``python -m MODULE FD SETTINGS`` starts one. The module calls :func:`serve` with what answers, or
:func:`serve_copies`: the process then imports once, and each copy of it is a process of its own,
for code that keeps something from request to request.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NoReturn

Reply = dict[str, Any]
Answer = Callable[[dict[str, Any]], Reply]
Kind = Literal["died", "timeout", "flooded", "raised", "refused"]
"""What went wrong; refused: what the code returned cannot be used."""
START_SECONDS = 120.0
"""What a process may take to import on a busy machine."""
MOST_BYTES = 2**20
"""Of a reply."""
_MOST_RELEASED = 4000  # numbers of processes in one message
_SET_PDEATHSIG = 1  # of prctl


class WorkerError(Exception):
    """There is no reply."""

    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(why)
        self.kind: Kind = kind


class Worker:
    """A process that answers, one request at a time; used by one thread at a time."""

    def __init__(self, module: str, settings: Mapping[str, Any]) -> None:
        """Start it and wait until it has imported what it needs.

        Raises:
            WorkerError: it has not.
        """
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel = _Channel(self._socket, self._process.poll)
        self._copying, self._released = threading.Lock(), list[int]()
        atexit.register(self.close)
        try:
            self._channel.read(START_SECONDS)
        except WorkerError:
            self.close()  # nobody else knows of it
            raise

    def request(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """Send a request and read the reply.

        Raises:
            WorkerError: there is none; the process is to be closed, unless the kind is "raised" or
                "refused".
        """
        return self._channel.ask(request, seconds)

    def copy(self) -> "WorkerCopy":
        """Start a copy of a process that serves copies; any thread may ask.

        Raises:
            WorkerError: it is gone.
        """
        try:
            mine, theirs = socket.socketpair()
        except OSError as error:
            raise WorkerError("died", f"no more open files ({error}): raise `ulimit -n`") from None
        try:
            with self._copying, theirs:
                released = self._released[:_MOST_RELEASED]
                del self._released[: len(released)]
                line = json.dumps(released).encode()
                socket.send_fds(self._socket, [line], [theirs.fileno()])
                pid = int(self._channel.read(START_SECONDS)["pid"])
            return WorkerCopy(mine, pid, self._released)
        except (OSError, WorkerError) as error:
            mine.close()
            raise WorkerError("died", f"the process that starts copies is gone: {error}") from None

    def close(self) -> None:
        """End it, and its copies."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.wait()
        self._socket.close()


class WorkerCopy:
    """A copy of a process, with requests of its own."""

    def __init__(self, channel: socket.socket, pid: int, released: list[int]) -> None:
        self._socket, self._pid, self._released = channel, pid, released
        self._channel = _Channel(channel, lambda: None)

    def request(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """As :meth:`Worker.request`."""
        return self._channel.ask(request, seconds)

    def close(self) -> None:
        """End it, with all that it started."""
        # Nobody waits for it before it is released: its number is nobody else's yet.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self._socket.close()
        self._released.append(self._pid)


class _Channel:
    """Lines of JSON on a socket."""

    def __init__(self, channel: socket.socket, ended: Callable[[], int | None]) -> None:
        self._socket, self._ended, self._read = channel, ended, b""
        self._poll = select.poll()  # select knows no descriptors from 1024 on
        self._poll.register(channel, select.POLLIN)

    def ask(self, request: Mapping[str, Any], seconds: float) -> Reply:
        end = time.monotonic() + seconds
        line = json.dumps(request, default=str).encode() + b"\n"
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise WorkerError("timeout", _late(seconds)) from None
        except OSError:
            raise WorkerError("died", self._gone()) from None
        reply = self.read(seconds, end)
        if "error" in reply:
            raise WorkerError(reply.get("kind", "raised"), str(reply["error"]))
        return reply

    def read(self, seconds: float, end: float | None = None) -> Reply:
        end = time.monotonic() + seconds if end is None else end
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise WorkerError("timeout", _late(seconds))
            try:
                got = self._socket.recv(2**16)
            except OSError:
                got = b""
            if not got:
                raise WorkerError("died", self._gone())
            self._read += got
            if len(self._read) > MOST_BYTES:
                raise WorkerError("flooded", f"a reply of more than {MOST_BYTES:,} bytes")
        line, _, self._read = self._read.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise WorkerError("refused", f"a reply that is no JSON object: {line!r:.60}")
        return reply

    def _gone(self) -> str:
        for _ in range(100):  # it hangs up a moment before it ends
            code = self._ended()
            if code is not None:
                return f"its process ended with code {code}"
            time.sleep(0.001)
        return "its process is gone"


def _late(seconds: float) -> str:
    return f"no answer within {seconds:g} s"


# ---------------------------------------------------------------- in the process


def start() -> tuple[socket.socket, dict[str, Any]]:
    """Return the channel and the settings of this process."""
    return socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])


def serve(channel: socket.socket, answer: Answer) -> None:
    """Say that this process is ready, and answer until nobody asks any more."""
    channel.sendall(b"{}\n")
    _answer_all(channel, answer)


def serve_copies(channel: socket.socket, make: Callable[[], Answer]) -> NoReturn:
    """Say that this process is ready, and be copied until nobody asks any more.

    Args:
        make: called in each copy; makes what answers there.
    """
    channel.sendall(b"{}\n")
    while True:
        released, descriptors, *_ = socket.recv_fds(channel, 2**16, 1)
        if not released:
            os._exit(0)
        pid = os.fork()
        if not pid:
            _be_a_copy(channel, socket.socket(fileno=descriptors[0]), make)
        os.close(descriptors[0])
        for ended in json.loads(released):
            os.waitpid(ended, 0)
        channel.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _be_a_copy(origin: socket.socket, channel: socket.socket, make: Callable[[], Answer]) -> None:
    os.setsid()
    # Code that hangs must not outlive the run, however that ends.
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    origin.close()
    try:
        _answer_all(channel, make())
    finally:
        os._exit(0)


def _answer_all(channel: socket.socket, answer: Answer) -> None:
    with channel.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            channel.sendall(_reply_to(line, answer).encode() + b"\n")


def _reply_to(line: str, answer: Answer) -> str:
    try:
        reply = answer(json.loads(line))
    except Exception as error:  # whatever the code raises is no reply
        reply = {"error": f"{type(error).__name__}: {error}"}
    try:
        return json.dumps(reply)
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"error": f"what it returned cannot be sent: {error}", "kind": "refused"})
