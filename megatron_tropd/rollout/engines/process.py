"""The process of a rollout engine, which may be started before anybody needs it.

Importing vLLM is most of an engine's start. A rank that will own an engine therefore starts its
process first of all (:func:`prepare`): vLLM is imported beside torch and Megatron, and the engine
takes the process when it is known what to serve. Standard library only.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

_DISTRIBUTED_NAMES = frozenset(
    [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
        *("GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    ]
)
_TRAINER_NAMES = frozenset(
    [
        # Expandable segments and vLLM's sleep mode exclude each other.
        *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
        # One queue keeps Megatron's collectives in order; vLLM's streams would wait for each other.
        "CUDA_DEVICE_MAX_CONNECTIONS",
    ]
)
"""What is set for the trainer's kernels and memory, not for vLLM's."""
_prepared: "EngineProcess | None" = None


class EngineProcess:
    """A child that imports vLLM and then serves its end of a pipe (``rollout.engines.child``)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it; what it prints is kept until it is told where it belongs."""
        self.environment = dict(environment)
        self._output: IO[bytes] | None = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with theirs:
            self.child = subprocess.Popen(
                [
                    *(sys.executable, "-m", f"{__package__}.child"),
                    *(str(theirs.fileno()), str(os.getpid())),
                ],
                env=self.environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        self.connection = Connection(ours.detach())

    def keep_output(self, log_file: Path) -> None:
        """Append what it printed first to ``log_file``; once it has answered, or has ended."""
        if self._output is not None:
            self._output.seek(0)
            with contextlib.suppress(OSError), log_file.open("ab") as log:
                log.write(self._output.read())
            self._output.close()
            self._output = None


def engine_threads(num_engines: int, local_world_size: int, world_size: int) -> int:
    """CPU threads of each engine of a node whose ranks own an equal share of all engines."""
    engines_here = max(1, num_engines * local_world_size // world_size)
    return max(1, len(os.sched_getaffinity(0)) // engines_here)


def prepare(threads: int) -> None:
    """Start a process for the next engine without CUDA on so many threads."""
    global _prepared
    discard()
    _prepared = EngineProcess(engine_environment(os.environ, threads=threads, cuda_devices=None))


def take(environment: Mapping[str, str]) -> EngineProcess:
    """The prepared process, if it runs in this environment; else a new one."""
    global _prepared
    prepared = _prepared
    # Imports add variables of their own, which the child's add too.
    if (
        prepared is not None
        and prepared.environment.items() <= environment.items()
        and prepared.child.poll() is None
    ):
        _prepared = None
        return prepared
    discard()
    return EngineProcess(environment)


def discard() -> None:
    """End the prepared process, if there is one."""
    global _prepared
    if _prepared is not None:
        _prepared.connection.close()
        _prepared.child.kill()
        _prepared.child.wait()
        _prepared = None


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these started; none if it is gone."""
    found = []
    for children in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def wait_gone(pids: Collection[int], seconds: float) -> None:
    """Wait until processes that lost their parent have ended, if they do in time.

    Only then is their device memory free. vLLM's workers end by themselves.
    """
    deadline = time.monotonic() + seconds
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for holds no memory any more."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def engine_environment(
    base: Mapping[str, str], *, threads: int, cuda_devices: str | None
) -> dict[str, str]:
    """Environment of the child: the parent's without its place in the job and its CUDA settings.

    Args:
        cuda_devices: CUDA_VISIBLE_DEVICES of the child; None: no CUDA.

    Returns:
        A new dictionary.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in _DISTRIBUTED_NAMES | _TRAINER_NAMES and not name.startswith("TORCHELASTIC_")
    }
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if cuda_devices is None:
        kept.pop("VLLM_BATCH_INVARIANT", None)  # a switch of kernels for GPUs
        ours |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Threads that spin while they wait starve each other on a busy machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            # Dynamo would compile the log-prob kernel at the first batch and needs a compiler.
            "TORCHDYNAMO_DISABLE": "1",
        }
    else:
        ours |= {
            "CUDA_VISIBLE_DEVICES": cuda_devices,
            # A forked worker would keep our pipe open, and the death of its engine be no error.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
    return kept | ours
