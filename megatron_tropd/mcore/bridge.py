"""Two worlds in one job: the ranks of the student, and after them those of a separate teacher.

Each world is torch's default process group of its own ranks. So whatever says "all ranks", in
Megatron or here, means those of its kind, and no collective of one waits for the other. What the
two have to say to each other crosses this bridge: messages of the student's first rank to all of
the teacher's, and rows of matrices between any ranks.
"""

import pickle
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.mcore import platform

_PATIENCE = timedelta(days=365)
"""For the next message: the teacher waits for rollouts, steps, saves and evaluations, each of which
the watchdogs of the student's ranks time. A lost connection ends the wait at once."""
_opened = 0


@dataclass(frozen=True)
class Worlds:
    """How many ranks of a job belong to whom; the student's come first."""

    students: int
    teachers: int

    @property
    def size(self) -> int:
        """All of them."""
        return self.students + self.teachers

    def own(self, rank: int) -> tuple[str, int, int]:
        """(Name, first rank, size) of the world of one of the job's ranks."""
        if rank < self.students:
            return "student", 0, self.students
        return "teacher", self.students, self.teachers


class Bridge:
    """The way between the two worlds, on one rank."""

    def __init__(self, worlds: Worlds, rank: int, store: dist.Store, timeout: timedelta) -> None:
        """Connect all ranks of the job; collective over both worlds.

        Args:
            rank: this one among all of the job's.
            store: one for all.
            timeout: after which a collective of both worlds fails.
        """
        self.worlds, self.rank = worlds, rank
        self.group = _group(dist.PrefixStore("bridge", store), rank, worlds.size, timeout)
        """All ranks of the job, for collectives."""
        messages = dist.PrefixStore("messages", store)
        # Torch's stubs lack what a backend can do.
        self._messages: Any = dist.ProcessGroupGloo(messages, rank, worlds.size, timeout=_PATIENCE)
        self._telling = threading.Lock()

    @property
    def teaches(self) -> bool:
        """Whether this rank is one of the teacher's."""
        return self.rank >= self.worlds.students

    def tell(self, message: object) -> None:
        """Send the teacher's ranks a message: the student's first rank does; from any thread."""
        with self._telling:
            self._send(message, self.worlds.students)

    def hear(self) -> Any:
        """The next message; on every rank of the teacher's."""
        first = self.worlds.students
        if self.rank != first:
            return pickle.loads(self._receive(first))
        packed = self._receive(0)
        for rank in range(first + 1, self.worlds.size):
            self._send_bytes(packed, rank)
        return pickle.loads(packed)

    def _send(self, message: object, rank: int) -> None:
        self._send_bytes(np.frombuffer(pickle.dumps(message), np.uint8).copy(), rank)

    def _send_bytes(self, packed: np.ndarray, rank: int) -> None:
        for part in (torch.tensor([len(packed)]), torch.from_numpy(packed)):
            self._messages.send([part], rank, 0).wait()

    def _receive(self, rank: int) -> np.ndarray:
        size = torch.zeros(1, dtype=torch.int64)
        self._messages.recv([size], rank, 0).wait()
        packed = torch.empty(int(size), dtype=torch.uint8)
        self._messages.recv([packed], rank, 0).wait()
        return packed.numpy()


def join(worlds: Worlds, rank: int, timeout: timedelta, **options: Any) -> Bridge:
    """Join the world of this rank as torch's default group, and build the bridge; collective.

    Args:
        rank: this one among all of the job's.
        timeout: after which a collective of any group fails.
        options: further ones of ``init_process_group``.
    """
    global _opened
    _opened += 1
    size = worlds.size
    base, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))
    base.set_timeout(timeout)
    store = dist.PrefixStore(f"worlds {_opened}", base)
    name, first, size = worlds.own(rank)
    own = dist.PrefixStore(name, store)
    dist.init_process_group(
        store=own, rank=rank - first, world_size=size, timeout=timeout, **options
    )
    return Bridge(worlds, rank, store, timeout)


def _group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """A process group of ranks that are not all in the default one.

    ``new_group`` cannot make it; vLLM makes its groups of two programs in the same way.
    """
    kind = dist.ProcessGroup.BackendType
    group = dist.ProcessGroup(store, rank, size)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("cpu", store), rank, size, timeout=timeout)
    gloo._set_sequence_number_for_group()
    group._set_default_backend(kind.GLOO)
    group._register_backend(torch.device("cpu"), kind.GLOO, gloo)
    if platform.has_cuda():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("cuda", store), rank, size, options)
        nccl._set_sequence_number_for_group()
        group._set_default_backend(kind.NCCL)
        group._register_backend(torch.device("cuda"), kind.NCCL, nccl)
    return group
