"""One rank: output goes to a log, a failure to the file the launcher reads, signals wait.

A rank that our launcher starts imports torch, Megatron and transformers while the launcher looks
for the other nodes. Then it waits for orders, JSON lines on its standard input (a socket): to check
the inputs of a run, which it answers with a line or ends, and to train.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from megatron_tropd.base import exits
from megatron_tropd.base.deterministic import set_environment
from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.failures import KINDS, Failure, exit_code, kind_of, report
from megatron_tropd.base.files import never_fail_to_print
from megatron_tropd.base.progress import Progress, StopFlag, failed_phase
from megatron_tropd.config import Config, config_from_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch.watchdog import Watchdog
from megatron_tropd.rollout.engines import process

if TYPE_CHECKING:
    from megatron_tropd.distill.inputs import Inputs

_SET_PDEATHSIG = 1  # of prctl
IMPORTED = "megatron_tropd.distill.loop"
"""What a rank imports before its first step, with all that this imports."""

JOBS = {"train": f"{IMPORTED}:train", "score": "megatron_tropd.distill.score:score"}
"""What ranks do for a command: a function of the command's folder."""


def run_rank(folder: RunFolder, *, announce: bool = False, job: str = "train") -> int:
    """Do a job as the rank the environment names; after an error the process ends here.

    Args:
        announce: print an error on the terminal too (where our own launcher does not).
        job: a key of ``JOBS``.

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
        world_size=config.world_size,
        timeout_minutes=config.run.timeout_minutes,
        whose="the teacher's" if config.teaches(rank) else "",
        say=say if announce else lambda _: None,
    )
    try:
        module, _, function = JOBS[job].partition(":")
        do = getattr(import_module(module), function)
        with watchdog:
            do(folder, console=console, stop=stop, progress=progress)
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
    """
    atexit._run_exitfuncs()
    _exit_now(code)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends; end it at once if that has happened.

    The process says so itself, first of all: what the parent would run between fork and exec
    (``preexec_fn``) may meet a lock that one of its threads held.
    """
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(exits.RESTART)


def main() -> NoReturn:
    """Be a rank that our launcher started, from here to the end of the process."""
    launcher, engine_threads = map(int, sys.argv[1:3])
    die_with(launcher)
    if engine_threads:
        process.prepare(engine_threads)
    printed = _import()
    with socket.socket(fileno=os.dup(0)) as link, link.makefile("rw") as orders:
        order = _next_order(orders)
        while "check" in order:
            config = config_from_dict(order["check"])
            if code := exit_code(partial(check_inputs, config)):
                _exit_now(code)
            print("usable", file=orders, flush=True)
            order = _next_order(orders)
    os.environ.update(order["environment"])
    folder = RunFolder(Path(order["run"]))
    with contextlib.suppress(OSError), log_file(folder, number("RANK")).open("ab") as log:
        log.write(printed)
    code = run_rank(folder, job=order["job"])
    # A stop that was asked for is no failure: the launcher knows the signal.
    leave(0 if exits.is_stop(code) else code)


def _next_order(orders: IO[str]) -> dict[str, Any]:
    line = orders.readline()
    if not line:
        _exit_now(exits.RESTART)  # the launcher is gone
    return json.loads(line)


def _import() -> bytes:
    """Import what takes seconds; returns what that printed, and shows it if it fails."""
    console = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as kept:
        for descriptor in (1, 2):
            os.dup2(kept.fileno(), descriptor)
        gc.disable()
        try:
            import_module(IMPORTED)
            failed = False
            gc.freeze()  # it stays: else the collector walks it again and again
        except BaseException:
            traceback.print_exc()
            failed = True
        gc.enable()
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, shown in enumerate(console, 1):
            os.dup2(shown, descriptor)
            os.close(shown)
        kept.seek(0)
        printed = kept.read()
    if failed:
        if number("LOCAL_RANK") == 0:  # once is enough
            sys.stderr.buffer.write(printed)
        _exit_now(exits.FAILED)
    return printed


def check_inputs(config: Config) -> "Inputs":
    """Read the inputs of a run, before anything of it is written.

    Raises:
        ConfigError, InputError: they are not usable.
    """
    from megatron_tropd.distill.inputs import load_inputs
    from megatron_tropd.mcore.options_check import check_options

    inputs = load_inputs(config)
    check_options(config, **{who: folder.config for who, folder in inputs.folders.items()})
    return inputs


if __name__ == "__main__":
    main()
