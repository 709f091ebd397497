"""A process of a fork server, with the part of ``subprocess.Popen`` that tests read of it."""

import subprocess
from multiprocessing.process import BaseProcess


class ForkedProcess:
    """Its exit code, as who started it by a shell would see it."""

    def __init__(self, process: BaseProcess, name: str) -> None:
        """Watch a process that runs; ``name`` is for an error."""
        self._process, self._name = process, name
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it; None: it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._name, timeout or 0.0)
        return self._process.exitcode
