"""Start one process per rank on this machine and never leave one behind.

Under torchrun or srun (``RANK`` and ``WORLD_SIZE`` set) nothing is started: the calling process is
a rank already. Locally each rank is a child in a session of its own, so that Ctrl-C reaches only
this process, which passes it on as SIGTERM: the ranks finish their step, save and leave.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from megatron_tropd import exits
from megatron_tropd.failures import Failure, report
from megatron_tropd.run_folder import RunFolder
from megatron_tropd.watchdog import read_beats

GRACE_SECONDS = 300.0
"""Between a signal and SIGKILL: one step and one checkpoint must fit."""
FAILURE_GRACE_SECONDS = 5.0
"""Between the death of one rank and SIGKILL for the others, which wait for it in a collective."""


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, srun or our own launcher already made this process a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def launch(world_size: int, folder: RunFolder) -> int:
    """Run ``world_size`` ranks of the run in ``folder`` and wait for them.

    Args:
        world_size: number of processes.
        folder: an opened run folder; the ranks read its ``config.json`` and log below it.

    Returns:
        0, or the exit code to pass on: 128 + the signal that asked to stop, else that of the first
        rank that failed.
    """
    received: list[int] = []
    previous = {
        s: signal.signal(s, lambda number, _: received.append(number)) for s in exits.STOP_SIGNALS
    }
    ranks = _start(world_size, folder)
    try:
        return _supervise(ranks, received, folder)
    finally:
        _kill(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(world_size: int, folder: RunFolder) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Ranks and engines take turns on the same cores: idle threads must not spin on them.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # Megatron's overlap of communication relies on the order of CUDA launches.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
    }
    command = [sys.executable, "-m", "megatron_tropd.worker", str(folder.root)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        for rank in range(world_size)
    ]


def _supervise(ranks: Sequence[subprocess.Popen], received: list[int], folder: RunFolder) -> int:
    deadline = None
    forwarded = 0
    failing = False
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            break
        if not failing and any(codes):
            failing = True
            report_killed(codes, folder)
            deadline = time.monotonic() + FAILURE_GRACE_SECONDS
        if len(received) > forwarded:
            forwarded = len(received)
            if forwarded > 1:
                break
            if not failing:
                deadline = time.monotonic() + GRACE_SECONDS
            for rank in ranks:
                rank.terminate()
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    _kill(ranks)
    if received:
        return exits.stopped_by(received[0])
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return exits.RESTART if code < 0 else code


def report_killed(codes: Sequence[int | None], folder: RunFolder, first_rank: int = 0) -> None:
    """Write down which rank a signal ended: it could not do so itself.

    Args:
        codes: of this node's ranks; None: still running.
        folder: of the run.
        first_rank: of this node.
    """
    beats = read_beats(folder.heartbeats, first_rank + len(codes))
    for rank, code in enumerate(codes, first_rank):
        if code is None or code >= 0:
            continue
        beat = beats.get(rank)
        where = f" in {beat.phase!r} of step {beat.step}" if beat else ""
        message = (
            f"Rank {rank} was killed by signal {-code} ({signal.Signals(-code).name}){where}. "
            "Start the same command again to resume. (SIGKILL without a reason in the logs: often "
            "the node ran out of memory.)"
        )
        report(
            folder.failure,
            Failure(
                kind="killed",
                message=message,
                rank=rank,
                step=beat.step if beat else None,
                phase=beat.phase if beat else None,
            ),
        )


def _kill(ranks: Sequence[subprocess.Popen]) -> None:
    for rank in ranks:
        try:
            # The whole session: a rank's engine goes with it.
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for rank in ranks:
        rank.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
