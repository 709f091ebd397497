"""One rank: its output goes to a log, its errors to a file the launcher reads, its signals wait."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import IO

from megatron_tropd.errors import ConfigError, InputError, TrainingError
from megatron_tropd.run_folder import RunFolder


class StopFlag:
    """Set by SIGTERM or SIGINT; the loop looks at it between steps."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, _: object) -> None:
        self.requested = True


def run_rank(folder: RunFolder) -> int:
    """Train as the rank the environment names. Returns the exit code."""
    rank = int(os.environ["RANK"])
    console = _redirect_output(folder.logs / f"rank_{rank:03d}.log")
    stop = StopFlag()
    try:
        from megatron_tropd.train import train

        train(folder, console=console, stop=stop)
    except (ConfigError, InputError, TrainingError) as error:
        traceback.print_exc()
        _leave_error(folder, rank, str(error))
        _exit_now(1)
    except Exception as error:
        traceback.print_exc()
        log = folder.logs / f"rank_{rank:03d}.log"
        _leave_error(folder, rank, f"{type(error).__name__}: {error}\nTraceback: {log}")
        _exit_now(1)
    return 0


def _redirect_output(log: Path) -> IO[str]:
    """Send fds 1 and 2 to ``log``; return the terminal for what the user should see."""
    console = os.fdopen(os.dup(2), "w", buffering=1)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return console


def _leave_error(folder: RunFolder, rank: int, message: str) -> None:
    (folder.logs / f"rank_{rank:03d}.error").write_text(message + "\n")


def _exit_now(code: int) -> None:
    # Other ranks may sit in a collective with us: a tidy shutdown would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run_rank(RunFolder(Path(sys.argv[1]))))
