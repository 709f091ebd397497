"""Checkpoints of the student: Megatron ``dist_checkpointing``, complete or invisible.

A checkpoint is written into ``.step_000123.tmp`` and renamed to ``step_000123`` once every rank
has written and the files are on disk: a name without the dot is always complete. Weights,
optimizer, learning-rate schedule, RNG states and the caller's ``extra`` (data position) load under
any TP x PP x DP x EP.
"""

import os
import queue
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.errors import InputError, TrainingError
from megatron_tropd.mcore.parallel import Ranks
from megatron_tropd.mcore.step import Student

_NAME = re.compile(r"step_(\d{6,})")


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks, distributed_optimizer: bool):
        """``keep``: complete checkpoints that survive a save, newest first."""
        self.folder = folder
        self.keep = keep
        self.ranks = ranks
        self.distributed_optimizer = distributed_optimizer

    def steps(self) -> list[int]:
        """Optimizer steps of the complete checkpoints, ascending."""
        return complete_steps(self.folder)

    def save(
        self,
        student: Student,
        *,
        step: int,
        extra: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write the state after ``step`` optimizer steps; collective.

        Args:
            student: what to save.
            step: optimizer steps done.
            extra: small JSON-like state of the caller, equal on all ranks.
            files: of the caller, by name; rank 0 writes them beside the state.

        Returns:
            The folder of the complete checkpoint.

        Raises:
            TrainingError: the folder could not be written; older checkpoints are untouched.
        """
        final = self.folder / f"step_{step:06d}"
        # Rank 0 decides: on a network file system others may not see the newest name yet.
        if _gather(step in self.steps())[0]:
            return final
        unfinished = self.folder / f".{final.name}.tmp"
        self._on_first_rank(lambda: _fresh(unfinished), unfinished)
        error = self._write(student, unfinished, extra)
        if any(_gather(error)):
            self._on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True), unfinished)
            reason = next(e for e in _gather(error) if e)
            raise TrainingError(self._failed(final, reason))
        self._on_first_rank(lambda: _write_files(unfinished, files or {}), unfinished)
        self._on_first_rank(lambda: _publish(unfinished, final), unfinished)
        self._on_first_rank(self._prune, self.folder)
        return final

    def load(self, student: Student, step: int) -> dict[str, Any]:
        """Put the checkpoint of ``step`` into ``student``; collective, any layout.

        Returns:
            The ``extra`` it was saved with.

        Raises:
            InputError: the checkpoint cannot be read.
        """
        path = self.folder / f"step_{step:06d}"
        try:
            state = self._read(student, path)
        except (Exception, CheckpointException) as error:  # half a dozen unrelated types
            raise InputError(
                f"Checkpoint {path} cannot be read: {_reason(error)}. Remove that folder to resume "
                f"from the one before it (complete: {self.steps()})."
            ) from error
        student.model.load_state_dict(state["model"], strict=True)
        student.optimizer.load_state_dict(state["optimizer"])
        student.scheduler.load_state_dict(state["scheduler"])
        if "rng" in state:
            _set_rng(state["rng"])
        return state["extra"]

    def _read(self, student: Student, path: Path) -> dict[str, Any]:
        wanted = self._state(student, extra={}, is_loading=True)
        common = dist_checkpointing.load_common_state_dict(str(path))
        if common["extra"]["layout"] != self._layout():
            wanted.pop("rng")
        return dist_checkpointing.load(wanted, str(path))

    def _state(self, student: Student, *, extra: dict[str, Any], is_loading: bool) -> dict:
        metadata = self._metadata()
        model = student.model.sharded_state_dict(metadata=metadata)
        optimizer = student.optimizer.sharded_state_dict(
            {"model": model}, is_loading=is_loading, metadata=metadata
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": student.scheduler.state_dict(),
            "rng": self._rng(),
            "extra": extra | {"layout": self._layout()},
        }

    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        if self.distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        return metadata

    def _layout(self) -> list[int]:
        return [self.ranks.tp_size, self.ranks.pp_size, self.ranks.dp_size, self.ranks.ep_size]

    def _rng(self) -> ShardedObject:
        """One object per rank: RNG states belong to a layout and load only under the same one."""
        return ShardedObject(
            "rng", _get_rng(), (self.ranks.world_size,), (self.ranks.rank,), replica_id=0
        )

    def _write(self, student: Student, folder: Path, extra: dict[str, Any]) -> str | None:
        # Megatron keeps the queue between saves: after a failure it would hold old results.
        # A plain queue instead of a manager process per rank: 0.1 s instead of 5-18 s.
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(
                self._state(student, extra=extra, is_loading=False),
                str(folder),
                async_strategy="mcore",
            )
        except (Exception, CheckpointException) as error:  # any failure must reach all ranks
            return _reason(error)
        return None

    def _on_first_rank(self, action: Any, path: Path) -> None:
        error = None
        if self.ranks.rank == 0:
            try:
                action()
            except OSError as caught:
                error = str(caught)
        reason = next((e for e in _gather(error) if e), None)
        if reason:
            raise TrainingError(self._failed(path, reason))

    def _failed(self, path: Path, reason: str) -> str:
        steps = self.steps()
        last = f"step {steps[-1]} is intact" if steps else "there is none yet"
        free = shutil.disk_usage(self.folder if self.folder.exists() else "/").free / 2**30
        return (
            f"Checkpoint {path} could not be written: {reason}. Free there: {free:.1f} GiB. Last "
            f"complete checkpoint: {last}. Make room or fix the folder, then give the same command "
            "again to resume."
        )

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            # Renamed first: a removal cut short must not leave something that looks complete.
            doomed = self.folder / f".step_{step:06d}.old"
            (self.folder / f"step_{step:06d}").rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for left_over in self.folder.glob(".step_*"):
            shutil.rmtree(left_over, ignore_errors=True)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below ``folder``, ascending."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(m.group(1)) for m in matches if m)


def _reason(error: BaseException) -> str:
    # CheckpointException is no Exception and hides what each rank met in a dictionary.
    if isinstance(error, CheckpointException):
        met = [failure[0] for failure in error.failures.values()]
        return "; ".join(f"{type(e).__name__}: {str(e).splitlines()[0]}" for e in met)
    return f"{type(error).__name__}: {error}"


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _publish(unfinished: Path, final: Path) -> None:
    for path in [*unfinished.rglob("*"), unfinished]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get_rng() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
