"""The rollout engines, as far as new weights go: the trainer's own ways to them, nobody at the end.

Pools and channels are the trainer's. What is made up: the places of the other ranks, what opens a
buffer in another process, the files, and the engine itself, which writes down what it is told.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tropd.planning.planned_run import PlannedRun
from megatron_tropd.rehearsal.world import World
from megatron_tropd.rollout.engines import pool
from megatron_tropd.rollout.engines.transports import Seat
from megatron_tropd.rollout.weights import mailbox


class RecordingEngine:
    """What a channel calls of an engine beside the trainer."""

    forgets = True
    """Asleep it drops its weights, as every engine on CUDA does."""

    def __init__(self, planned: PlannedRun) -> None:
        """Nothing is received yet."""
        self.gpus = planned.rollout.engine_tensor_parallel
        self.weight_bytes = planned.student.parameters * planned.element
        self.updates = 0
        """Buffers that it was told to read."""

    def begin_weights(self) -> None:
        """Buffers follow."""

    def take_weights(self, update: dict[str, Any]) -> None:
        """Read one buffer."""
        assert update["ipc_handles"]
        self.updates += 1

    def finish_weights(self) -> None:
        """That was the last one."""

    def load_weights(self, folder: Path) -> None:
        """Read files."""

    def close(self) -> None:
        """Nothing is held."""


class Counted:
    """An export that counts the bytes which reach this rank."""

    def __init__(self, export: Callable[..., Iterator[tuple[str, Tensor | None]]]) -> None:
        """``export``: of a :class:`~megatron_tropd.mcore.student.StudentModel`."""
        self.bytes = 0
        self._export = export

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor | None]]:
        """Go through the tensors."""
        for name, tensor in self._export(*args, **kwargs):
            self.bytes += 0 if tensor is None else tensor.nbytes
            yield name, tensor


def believe(planned: PlannedRun, world: World, folder: Path) -> None:
    """Let the trainer find every rank on a GPU of its own, and write no weights."""
    world.let_each_say(Seat, lambda rank: seat(planned, rank))
    setattr(pool, "roomy_root", lambda engines, weight_bytes: folder)  # noqa: B010
    setattr(mailbox, "_save", lambda bucket, path: None)  # noqa: B010


def seat(planned: PlannedRun, rank: int) -> Seat:
    """Where a rank sits, if ranks fill one node after the other, as launchers place them."""
    node, rollout = planned.hardware.gpus_per_node, planned.rollout
    block = planned.parallel.world_size // rollout.num_engines
    engine = RecordingEngine(planned) if rank % block == 0 else None
    return Seat(
        host=f"node {rank // node}",
        device=rank % node,
        uuid=f"GPU-{rank}",
        engine_gpus=engine.gpus if engine else 0,
        forgets=engine is not None,
        weight_bytes=engine.weight_bytes if engine else 0,
    )
