"""Checkpoints of the student: Megatron ``dist_checkpointing``, complete or invisible.

Saving copies the state to host memory and returns; threads write it while training goes on, into
``.step_000123.tmp``, which is renamed to ``step_000123`` once every rank has written, the files are
on disk and their checksums beside them: a name without the dot is always complete. Weights,
optimizer, learning-rate schedule, RNG states and the caller's ``extra`` (data position) load under
any TP x PP x DP x EP; those saved as ``dp_reshardable`` under any DP.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.files import is_missing, read_patiently
from megatron_tropd.mcore.async_save import SaveQueue, ThreadCaller, forget_results
from megatron_tropd.mcore.checksums import (
    Checksum,
    problems,
    read_checksums,
    share,
    write_checksums,
)
from megatron_tropd.mcore.host_memory import shortage
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.models import has_transformer_engine
from megatron_tropd.mcore.student import Student

_NAME = re.compile(r"step_(\d{6,})")
ANY_LAYOUT, ANY_DATA = "fully_reshardable", "dp_reshardable"
"""Two forms of a distributed optimizer's state (Megatron's ``distrib_optim_sharding_type``).

For the first every rank gathers the whole state of its part of the model, 12 bytes a parameter in
host memory, so that it can be cut at parameters. In the second it writes its own slice of the
buffers as they lie: nothing is sent, and only the number of replicas may change.
"""


@dataclass(frozen=True)
class _Save:
    """A save in flight."""

    unfinished: Path
    final: Path
    writer: ThreadCaller


class Checkpoints:
    """The checkpoint folder of one run. Every method but :meth:`steps` is collective."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        layout: Layout,
        distributed_optimizer: bool,
        say: Callable[[str], None] = print,
    ):
        """``keep``: complete checkpoints that survive a save; ``say``: where rank 0 warns."""
        self.folder = folder
        self.keep = keep
        self.layout = layout
        self.distributed_optimizer = distributed_optimizer
        self._say = say
        self._queue = SaveQueue()
        self._sharding_of: dict[int, str] = {}
        self._save: _Save | None = None
        self._removal: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Optimizer steps of the complete checkpoints, ascending."""
        return complete_steps(self.folder)

    def save(
        self,
        student: Student,
        *,
        step: int,
        extra: dict[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
        sharding: str = ANY_LAYOUT,
    ) -> None:
        """Begin to write the state after ``step`` optimizer steps; waits for the save before.

        The state is copied to host memory before this returns. :meth:`poll` completes the
        checkpoint some steps later, :meth:`wait` at once.

        Args:
            student: what to save.
            step: optimizer steps done.
            extra: small JSON-like state of the caller, equal on all ranks.
            files: further small files of the caller by name; rank 0's count.
            sharding: of a distributed optimizer's state, :data:`ANY_LAYOUT` or :data:`ANY_DATA`.

        Raises:
            TrainingError: the folder could not be written, or a node has too little memory for the
                copy; older checkpoints are untouched.

        Collectives: Megatron's exchange of what each rank writes; gathers of small objects; for
        :data:`ANY_LAYOUT` all-gathers of a distributed optimizer's state over the replicas.
        """
        self.wait()
        final = self.folder / f"step_{step:06d}"
        before = self._sharding_of.get(step, sharding)
        if step in self._steps_of_first_rank() and before in (sharding, ANY_LAYOUT):
            return
        if lacking := self._lacking(student, sharding):
            raise TrainingError(f"Checkpoint {final} was not begun: {lacking}")
        unfinished = self.folder / f".{final.name}.tmp"
        self._on_first_rank(lambda: _fresh(unfinished, files), unfinished)
        forget_results()
        request = dist_checkpointing.save(
            self.state(student, extra=extra, sharding=sharding, is_loading=False),
            str(unfinished),
            async_sharded_save=True,
            async_strategy="mcore",
        )
        self._save = _Save(unfinished, final, self._queue.start(request))
        self._sharding_of[step] = sharding

    def check_memory(self, student: Student) -> None:
        """Refuse a run whose last checkpoint, the largest, no node could save; collective.

        Raises:
            ConfigError: a node has too little memory left, on every rank.
        """
        if lacking := self._lacking(student, ANY_LAYOUT):
            raise ConfigError(f"The run could not save its last checkpoint: {lacking}")

    def _lacking(self, student: Student, sharding: str) -> str:
        """Why a node cannot hold what a save copies, or nothing if all can; collective."""
        form = sharding if self.distributed_optimizer else None
        if not (lacking := shortage(saving_bytes(student, self.layout, form))):
            return ""
        steps = self.steps()
        advice = (
            "For the checkpoints of run.checkpoint_every, which are held in memory until they are "
            f"written, run.checkpoint_sharding = {ANY_DATA!r} gathers nothing; the last one is "
            f"{ANY_LAYOUT!r}. "
        )
        return (
            f"{lacking}. Last complete checkpoint: {f'step {steps[-1]}' if steps else 'none yet'}. "
            f"{advice if self.distributed_optimizer else ''}Give the job more memory (Slurm: "
            "--mem=0 is all of a node's), or offload less, then give the same command again."
        )

    def poll(self) -> None:
        """Complete the save in flight if every rank has written; returns at once if not.

        Raises:
            TrainingError: a rank could not write; older checkpoints are untouched.

        Collectives: none without a save in flight; else an all-reduce of [1], and when it is
        complete a few small ones more.
        """
        self._complete(blocking=False)

    def wait(self) -> None:
        """Like :meth:`poll`, but until the save in flight is complete and old ones are gone."""
        self._complete(blocking=True)
        if self._removal is not None:
            self._removal.join()

    def _complete(self, *, blocking: bool) -> None:
        save, reason = self._save, None
        if save is None:
            return
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                return
        except CheckpointException as error:  # raised on every rank alike
            reason = _reason(error)
        except OSError as error:  # the first rank's own files: the others still wait for it
            raise TrainingError(self._failed(save.final, str(error)), kind="disk") from error
        self._save = None
        written = _gather((save.writer.reason, save.writer.checksums))
        reason = next((met for met, _ in written if met), reason)
        if reason:
            self._on_first_rank(lambda: _remove(save.unfinished), save.unfinished)
            raise TrainingError(self._failed(save.final, reason), kind="disk")
        checksums = {name: entry for _, part in written for name, entry in part.items()}
        self._on_first_rank(
            lambda: _publish(save.unfinished, save.final, checksums), save.unfinished
        )
        self._on_first_rank(self._prune, self.folder)

    def load_newest(self, student: Student) -> dict[str, Any] | None:
        """Put the newest checkpoint that is intact into ``student``; any layout.

        A damaged one is named in a warning and renamed to ``step_000123.damaged``. One that could
        not be read is not taken for damaged: an older one would cost steps for nothing.

        Returns:
            The ``extra`` it was saved with; None where there is no checkpoint.

        Raises:
            InputError: there are checkpoints, but none is intact.
            TrainingError: the newest could not be read; kind "disk".
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._steps_of_first_rank()):
            try:
                extra = self.load(student, step)
            except InputError as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return extra
        if damaged:
            raise InputError("No checkpoint is intact. " + " ".join(damaged.values()))
        return None

    def load(self, student: Student, step: int) -> dict[str, Any]:
        """Check the checkpoint of ``step``, each rank a share, and put it into ``student``.

        Returns:
            The ``extra`` it was saved with.

        Raises:
            InputError: files are missing, cut short or changed (they are named); on every rank.
            TrainingError: a file could not be read, though tried for a minute; on every rank.
            ConfigError: it loads under other layouts only; on every rank.
        """
        path = self.folder / f"step_{step:06d}"
        self._together(lambda: self._check(path), path)
        saved = self._together(lambda: _saved_extra(path), path)
        self._check_layout(saved, student, path)
        self._sharding_of[step] = sharding = saved.get("sharding", ANY_LAYOUT)
        wanted = self.state(student, extra={}, sharding=sharding, is_loading=True)
        if saved["layout"] != self._sizes():
            wanted.pop("rng")
        state = self._together(lambda: _read(wanted, path), path)
        student.model.restore(state["model"])
        if student.average is not None:
            student.average.restore(state["average"])
        with torch.no_grad():  # Megatron copies into the parameters themselves if they are float32
            student.optimizer.load_state_dict(state["optimizer"])
        student.scheduler.load_state_dict(state["scheduler"])
        if "rng" in state:
            _set_rng(state["rng"])
        return state["extra"]

    def _check_layout(self, saved: Mapping[str, Any], student: Student, path: Path) -> None:
        """Refuse a checkpoint that cannot be cut as this run needs it; it is not damaged."""
        if saved.get("sharding", ANY_LAYOUT) == ANY_LAYOUT:
            return
        now = self._about(student, ANY_DATA)
        if saved.get("slices") == now["slices"]:
            return
        # Checkpoints from before there was this setting do not name it.
        was, kept = {"parallel.virtual_pipeline": 1} | saved.get("cut_by", {}), now["cut_by"]
        other = [
            f"{key} was {was.get(key)}, is {kept[key]}" for key in kept if was.get(key) != kept[key]
        ]
        raise ConfigError(
            f"{path} was saved with run.checkpoint_sharding = {ANY_DATA!r}, in slices of the "
            f"optimizer's buffers, and those are cut otherwise now: "
            f"{'; '.join(other) or 'other layers, or another version of Megatron-Core'}. "
            "Resume with what it was (parallel.data and parallel.context may differ). To change "
            "it, stop the run with a signal (Ctrl-C, SIGTERM): the checkpoint that it saves then "
            f"is {ANY_LAYOUT!r}, and so is its last one."
        )

    def _about(self, student: Student, sharding: str) -> dict[str, Any]:
        """What a checkpoint says of how it is cut.

        Collectives: for :data:`ANY_DATA` a gather of small objects.
        """
        about: dict[str, Any] = {"layout": self._sizes()}
        if self.distributed_optimizer:
            about["sharding"] = sharding
        if sharding == ANY_DATA:
            parts = sorted({str(part) for part in _gather(_slices(student))})
            about |= {"slices": parts, "cut_by": _cut_by(student)}
        return about

    def _check(self, path: Path) -> None:
        """Compare this rank's share of the files with their checksums. No collectives.

        Raises:
            InputError: some are damaged.
            OSError: one could not be read.
        """
        files = read_checksums(path)
        if files is None:
            if self.layout.is_main:
                self._say(f"{path} has no checksums.json (an older version wrote it): not checked.")
            return
        mine = share(files, self.layout.rank, self.layout.world_size)
        if found := problems(path, files, mine):
            raise InputError("; ".join(found))

    def _together[T](self, read: Callable[[], T], path: Path) -> T:
        """Call ``read``, which has no collectives, on every rank; all return or raise alike."""
        try:
            value, failure = read(), None
        except (Exception, CheckpointException) as error:  # half a dozen unrelated types
            failure = _is_unreadable(error), _reason(error)
        failures = [f for f in _gather(failure) if f]
        if not failures:
            return value
        unreadable = list(dict.fromkeys(reason for temporary, reason in failures if temporary))
        if unreadable:
            raise TrainingError(
                f"{path} could not be read: {'; '.join(unreadable)}. What is in it may be intact, "
                "so nothing older is taken. Give the same command again once the file system "
                "answers; if the file is lost, remove the folder of that checkpoint.",
                kind="disk",
            )
        reasons = dict.fromkeys(reason for _, reason in failures)
        raise InputError(
            f"Checkpoint {path} cannot be read: {'; '.join(reasons)}. Remove that folder to resume "
            f"from the one before it (complete: {self.steps()})."
        )

    def _steps_of_first_rank(self) -> list[int]:
        """On a network file system others may not see the newest name yet."""
        list_folder = self.steps if self.layout.is_main else list[int]
        return _gather(self._together(lambda: read_patiently(list_folder), self.folder))[0]

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        for bad, reason in damaged.items() if self.layout.rank == 0 else ():
            self._say(f"WARNING: {reason} Resuming from step {step} instead.")
            path = self.folder / f"step_{bad:06d}"
            target = path.with_name(f"{path.name}.damaged")
            with contextlib.suppress(OSError):
                _remove(target)
                path.rename(target)

    def state(
        self, student: Student, *, extra: dict[str, Any], sharding: str, is_loading: bool
    ) -> dict[str, Any]:
        """What a checkpoint holds, as Megatron's sharded state dictionary of this rank.

        Collectives: Megatron's gather of a distributed optimizer's states, if any layout is to
        read them.
        """
        metadata = self._metadata(sharding)
        model = student.model.state(metadata)
        optimizer = student.optimizer.sharded_state_dict(
            {"model": model}, is_loading=is_loading, metadata=metadata
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": student.scheduler.state_dict(),
            "rng": self._rng(),
            "extra": extra | self._about(student, sharding),
            **({} if student.average is None else {"average": student.average.state(metadata)}),
        }

    def _metadata(self, sharding: str) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": self.layout.loss_group,
        }
        if self.distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = sharding
        return metadata

    def _sizes(self) -> list[int]:
        layout = self.layout
        sizes = [layout.tp_size, layout.pp_size, layout.dp_size, layout.ep_size]
        # Checkpoints from before there were these axes have no sizes of them.
        younger = [layout.cp_size, layout.vp_size]
        while younger and younger[-1] == 1:
            younger.pop()
        return sizes + younger

    def _rng(self) -> ShardedObject:
        """One object per rank: RNG states belong to a layout and load only under the same one."""
        return ShardedObject(
            "rng", _get_rng(), (self.layout.world_size,), (self.layout.rank,), replica_id=0
        )

    def _on_first_rank(self, action: Any, path: Path) -> None:
        error = None
        if self.layout.rank == 0:
            try:
                action()
            except OSError as caught:
                error = str(caught)
        reason = next((e for e in _gather(error) if e), None)
        if reason:
            raise TrainingError(self._failed(path, reason), kind="disk")

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
            name = f"step_{step:06d}"
            (self.folder / name).rename(self.folder / f".{name}.old")
        doomed = list(self.folder.glob(".step_*"))
        if doomed:
            # Removing thousands of files takes a network file system its time.
            self._removal = threading.Thread(target=_remove, args=doomed, daemon=True)
            self._removal.start()


def saving_bytes(student: Student, layout: Layout, sharding: str | None) -> int:
    """About what a save takes of the host's memory on this rank, until it is written.

    Args:
        student: what is saved.
        layout: this rank's place.
        sharding: as of :meth:`Checkpoints.save`; None: no distributed optimizer.
    """
    held = list(student.model.trainable().values())
    # Experts are spread over the replicas: each may be the one that writes its own.
    mine = [p for p in held if layout.replica == 0 or not getattr(p, "allreduce", True)]
    states = 12 if sharding or held[0].itemsize == 2 else 8
    if sharding == ANY_LAYOUT:
        mine = held
    of_states = sum(p.numel() for p in (mine if sharding is None else held)) * states
    if sharding == ANY_DATA:
        of_states = sum(p.numel() * states // _holders(p, layout) for p in held)
    average = 0 if student.average is None else 4
    return of_states + sum(p.nbytes + average * p.numel() for p in mine)


def _holders(parameter: torch.Tensor, layout: Layout) -> int:
    """Ranks with the same part of a parameter, over which its optimizer's states are spread."""
    replicas = layout.dp_size * layout.cp_size
    if getattr(parameter, "allreduce", True):
        return replicas
    return layout.tp_size * replicas // (layout.etp_size * layout.ep_size)


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below ``folder``, ascending."""
    try:
        matches = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(m.group(1)) for m in matches if m)


def _slices(student: Student) -> str:
    """Digest of where each parameter lies in the buffers of this rank's optimizer.

    Two that differ would give one parameter the state of another. The number of replicas is not in
    it: only the padding behind the last parameter of a bucket depends on that.
    """
    lies = []
    for chunk in student.chunks:
        names = {p: name for name, p in chunk.module.named_parameters()}
        lies += [
            [
                str(bucket.grad_data.dtype),
                [(names[p], *bucket.param_to_index[p]) for p in bucket.params_list],
            ]
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
            for bucket in buffer.buckets
        ]
    return hashlib.sha256(json.dumps(lies).encode()).hexdigest()


def _cut_by(student: Student) -> dict[str, Any]:
    """What usually decides it, by the names of the settings."""
    config, ddp = student.module.config, student.chunks[0].ddp_config
    of_experts = {
        "parallel.expert": config.expert_model_parallel_size,
        "parallel.expert_tensor": config.expert_tensor_parallel_size,
        "megatron.model.moe_grouped_gemm": config.moe_grouped_gemm,
    }
    return {
        "parallel.tensor": config.tensor_model_parallel_size,
        "parallel.pipeline": config.pipeline_model_parallel_size,
        "parallel.virtual_pipeline": len(student.chunks),
        **(of_experts if config.num_moe_experts else {}),
        "parallel.distributed_optimizer": ddp.use_distributed_optimizer,
        "megatron.ddp.overlap_grad_reduce": ddp.overlap_grad_reduce,
        "megatron.ddp.bucket_size": ddp.bucket_size,
        "megatron.ddp.grad_reduce_in_fp32": ddp.grad_reduce_in_fp32,
        "Transformer Engine's layers": has_transformer_engine(),
    }


def _saved_extra(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. No collectives."""
    return _reading(lambda: dist_checkpointing.load_common_state_dict(str(path))["extra"])


def _read(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state of a checkpoint, in the form of ``wanted``. No collectives."""
    # Megatron's check that the ranks want every part once is a collective, in which the others
    # would wait for a rank that cannot read. Saving has made it.
    load = partial(dist_checkpointing.load, wanted, str(path), validate_access_integrity=False)
    return _reading(load)


def _reading[T](load: Callable[[], T]) -> T:
    """Call ``load`` until the file system answers; raise what that said."""

    def read() -> T:
        try:
            return load()
        except CheckpointException as error:
            # No Exception; behind it is what the file system said.
            raise next(iter(_causes(error)), error) from error

    return read_patiently(read)


def _causes(error: BaseException) -> list[BaseException]:
    """What each rank met: CheckpointException is no Exception and hides it in a dictionary."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    lines = ((type(e).__name__, *str(e).splitlines()) for e in _causes(error))
    return "; ".join(": ".join(line[:2]) for line in lines)


def _is_unreadable(error: BaseException) -> bool:
    """Whether a file could not be read, which says nothing about what is in it."""
    if not isinstance(error, OSError) or is_missing(error):
        return False
    # EINVAL: a place before the beginning of a file that was cut short.
    return error.errno not in (None, errno.EINVAL)


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _fresh(folder: Path, files: Mapping[str, bytes]) -> None:
    _remove(folder)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(unfinished: Path, final: Path, checksums: dict[str, Checksum]) -> None:
    """Name a checkpoint whose tensors are on disk; ``checksums``: those of their files."""
    for path in unfinished.iterdir():
        if path.name not in checksums:
            _fsync(path)
    write_checksums(unfinished, checksums)
    _fsync(unfinished)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        _remove(old)
        final.rename(old)
    unfinished.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this to a folder; they write it through.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
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
