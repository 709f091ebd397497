"""One rank: its output goes to a log, its errors to a file the launcher reads, its signals wait."""

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import IO, NoReturn

from megatron_tropd.errors import ConfigError, InputError, TrainingError
from megatron_tropd.exits import STOP_SIGNALS
from megatron_tropd.run_folder import RunFolder


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; the loop looks at it between steps."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, _: object) -> None:
        self.requested = True


def run_rank(folder: RunFolder, *, announce: bool = False) -> int:
    """Train as the rank the environment names; after an error the process ends here.

    Args:
        folder: an opened run folder.
        announce: print an error on the terminal too (where our own launcher does not).

    Returns:
        0.
    """
    rank = int(os.environ["RANK"])
    log = folder.logs / f"rank_{rank:03d}.log"
    console = _redirect_output(log)
    stop = StopFlag()
    try:
        from megatron_tropd.train import train

        train(folder, console=console, stop=stop)
        return 0
    except (ConfigError, InputError, TrainingError) as error:
        traceback.print_exc()
        message = str(error)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}\nTraceback: {log}"
    if announce:
        print(f"tropd: rank {rank}: {message}", file=console)
    _leave_error(folder, rank, message)
    _exit_now(1)


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
    with contextlib.suppress(OSError):  # a full disk must not keep the process from ending
        (folder.logs / f"rank_{rank:03d}.error").write_text(message + "\n")


def _exit_now(code: int) -> NoReturn:
    # Other ranks may sit in a collective with us: a tidy shutdown would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run_rank(RunFolder(Path(sys.argv[1]))))
