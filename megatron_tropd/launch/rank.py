"""One rank: output goes to a log, a failure to the file the launcher reads, signals wait."""

import atexit
import os
import sys
import traceback
from pathlib import Path
from typing import IO, NoReturn

from megatron_tropd.base import exits
from megatron_tropd.base.deterministic import set_environment
from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.failures import KINDS, Failure, kind_of, report
from megatron_tropd.base.files import never_fail_to_print
from megatron_tropd.base.progress import Progress, StopFlag, failed_phase
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch.parent import die_with
from megatron_tropd.launch.watchdog import Watchdog


def run_rank(folder: RunFolder, *, announce: bool = False) -> int:
    """Train as the rank the environment names; after an error the process ends here.

    Args:
        folder: an opened run folder.
        announce: print an error on the terminal too (where our own launcher does not).

    Returns:
        0 when the run is complete, 128 + the signal after which it was left.
    """
    rank = number("RANK")
    log = log_file(folder, rank)
    console = _redirect_output(log)
    stop, progress = StopFlag(), Progress()

    def say(message: str) -> None:
        print(f"tropd: rank {rank}: {message}", file=console)

    config = folder.read_config()
    set_environment(config.run.deterministic)
    watchdog = Watchdog(
        progress,
        folder=folder.heartbeats,
        failure=folder.failure,
        rank=rank,
        world_size=config.parallel.world_size,
        timeout_minutes=config.run.timeout_minutes,
        say=say if announce else lambda _: None,
    )
    try:
        from megatron_tropd.distill.loop import train

        with watchdog:
            train(folder, console=console, stop=stop, progress=progress)
        complete = folder.summary.exists() or stop.signal is None
        return exits.COMPLETE if complete else exits.stopped_by(stop.signal or 0)
    except (ConfigError, InputError, TrainingError) as error:
        traceback.print_exc()
        kind, message, phase = kind_of(error), str(error), failed_phase(error)
    except BaseException as error:  # CheckpointException is no Exception
        traceback.print_exc()
        kind, phase = kind_of(error), failed_phase(error)
        message = f"{type(error).__name__}: {error}\nTraceback: {log}"
    failure = Failure(
        kind=kind,
        message=message,
        rank=rank,
        step=progress.step + 1,
        phase=phase or progress.phase,
    )
    # A full disk must not swallow the reason.
    if not report(folder.failure, failure) or announce:
        say(message)
    _exit_now(KINDS[kind])


def log_file(folder: RunFolder, rank: int) -> Path:
    """Where a rank prints."""
    return folder.logs / f"rank_{rank:03d}.log"


def _redirect_output(log: Path) -> IO[str]:
    """Send fds 1 and 2 to ``log``; return the terminal for what the user should see."""
    console = os.fdopen(os.dup(2), "w", buffering=1)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    never_fail_to_print()
    return console


def _exit_now(code: int) -> NoReturn:
    # Other ranks may sit in a collective with us: a tidy shutdown would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End a rank that is done, without the interpreter's own clearing up.

    A thread of a process group that lets go of its last tensor wants the interpreter's lock. In an
    interpreter that is being cleared up this wish ends the thread, in a place where C++ allows no
    such end: SIGABRT, "terminate called without an active exception", of a run that was complete.

    Args:
        code: of the process.
    """
    atexit._run_exitfuncs()
    _exit_now(code)


def work(folder: RunFolder) -> NoReturn:
    """Be a rank that our launcher started, from here to the end of the process."""
    code = run_rank(folder)
    # A stop that was asked for is no failure: the launcher knows the signal.
    leave(0 if exits.is_stop(code) else code)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    work(RunFolder(Path(sys.argv[1])))
