"""Ways of the student's weights from the training ranks to the engines beside them.

On CUDA an engine reads them on its own GPUs, where the ranks that share these have them: vLLM's
``ipc`` weight transfer, one buffer at a time. Elsewhere, or if a GPU of an engine belongs to no
rank, they go through a folder in shared memory.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.weights.interface import NamedTensor
from megatron_tropd.rollout.weights.mailbox import BUCKET_BYTES, WeightMailbox

_EXPANDABLE, _FIXED = "expandable_segments:True", "expandable_segments:False"


@dataclass(frozen=True)
class Seat:
    """A rank's place on the machines, and the engine that it owns, if it owns one."""

    host: str
    device: int | None = None
    """Index of its CUDA device on this host; None without CUDA."""
    uuid: str = ""
    """Of that device."""
    engine_gpus: int = 0
    """GPUs of its engine, from its own device on; 0: it owns none."""
    forgets: bool = False
    """Whether its engine drops its weights asleep."""
    weight_bytes: int = 0
    """Of one version, on the way to its engine."""


class WeightTransport(Protocol):
    """How weights get into the engines beside the ranks; :meth:`send` is collective."""

    receivers: tuple[int, ...]
    """Ranks that need the tensors; the others are given None."""

    def send(self, tensors: Iterator[NamedTensor], engine: RolloutEngine | None) -> None:
        """Give this rank's engine, if it owns one, the weights; exhausts ``tensors``."""

    def close(self) -> None:
        """Let go of everything; not collective."""


class FolderTransport:
    """Files in shared memory, written by the engine's owner and mapped by its workers."""

    def __init__(self, owners: Sequence[int], root: Path | None) -> None:
        """Make this rank's folder.

        Args:
            owners: ranks with an engine.
            root: where (:func:`~megatron_tropd.rollout.weights.mailbox.roomy_root`); None:
                this rank owns no engine.
        """
        self.receivers = tuple(owners)
        self._mailbox = None if root is None else WeightMailbox(root)

    def send(self, tensors: Iterator[NamedTensor], engine: RolloutEngine | None) -> None:
        """Write the weights, have them loaded, remove them."""
        folder = None
        try:
            if self._mailbox is not None:
                folder = self._mailbox.write(tensors)
        finally:
            for _ in tensors:  # making them is collective, also where they cannot be written
                pass
        _give_cache_back()
        if engine is not None and self._mailbox is not None and folder is not None:
            engine.load_weights(folder)
            self._mailbox.clear()

    def close(self) -> None:
        """Remove the folder."""
        if self._mailbox is not None:
            self._mailbox.close()


class DeviceTransport:
    """A buffer on each GPU of an engine, filled by the rank there and read by the worker there.

    Every worker needs a handle of memory on its own GPU (vLLM looks them up by the GPU's UUID), so
    each of these ranks receives all tensors and the first one tells the engine where they lie.
    """

    def __init__(
        self,
        groups: Mapping[int, tuple[int, ...]],
        *,
        rank: int,
        uuid: str,
        device: torch.device,
        export: Callable[[Tensor], tuple[Any, ...]],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Meet the ranks of the same engine.

        Args:
            groups: ranks of each engine's GPUs, by the rank that owns it (:func:`device_groups`).
            export: what another process needs to open a tensor (:func:`export_by_ipc`).
            bucket_bytes: handed over at a time; a larger tensor alone.
        """
        self.receivers = tuple(sorted(r for ranks in groups.values() for r in ranks))
        self._uuid, self._device, self._export = uuid, device, export
        self._bucket_bytes = bucket_bytes
        self._takes_part = rank in self.receivers
        self._group: dist.ProcessGroup | None = None
        mine = next((list(ranks) for ranks in groups.values() if rank in ranks), [])
        if len(mine) > 1:
            # By its members alone: beside a default group that is bound to a device, those who are
            # none would split NCCL's communicator, and wait there for members who do not.
            self._group = dist.new_group(
                mine,
                timeout=_timeout(),
                backend="gloo",
                use_local_synchronization=True,
                group_desc="GPUS_OF_AN_ENGINE",
            )

    def send(self, tensors: Iterator[NamedTensor], engine: RolloutEngine | None) -> None:
        """Hand the weights over, one buffer after the other."""
        if self._takes_part:
            _give_cache_back()
            self._meet()
            sent = _Sent(self, engine)
            sent.begin()
            for name, tensor in tensors:
                assert tensor is not None, f"{name} did not reach a rank that hands it over"
                sent.add(name, tensor.detach())
            sent.finish()
        else:
            for _ in tensors:  # making them is collective
                pass

    def close(self) -> None:
        """Nothing is kept between two hand-overs."""

    def stage(self, size: int) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
        """A buffer on this rank's GPU, and the handles of those on all GPUs of the engine."""
        with fixed_segments():
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        handle = {self._uuid: self._export(buffer)}
        if self._group is None:
            return buffer, handle
        handles: list[Any] = [None] * self._group.size()
        dist.all_gather_object(handles, handle, group=self._group)
        return buffer, {uuid: args for one in handles for uuid, args in one.items()}

    def wait_for_each_other(self) -> None:
        """What was queued on this GPU is done, and so it is on the engine's others."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._meet()

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    @property
    def bucket_bytes(self) -> int:
        """Handed over at a time."""
        return self._bucket_bytes


@dataclass
class _Sent:
    """One version on its way. Ranks of an engine go through the same tensors in the same order."""

    transport: DeviceTransport
    engine: RolloutEngine | None
    """Of this rank; None: it fills the buffer for another rank's."""
    _buffer: Tensor | None = None
    _handles: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _used: int = 0
    _parts: list[tuple[str, Tensor]] = field(default_factory=list)
    """Of the buffer; as meta tensors."""
    _error: TrainingError | None = None

    def begin(self) -> None:
        self._tell(lambda engine: engine.begin_weights())

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        # Of one type each: behind an odd number of bytes a wider type would not be aligned.
        other = bool(self._parts) and self._parts[0][1].dtype != tensor.dtype
        if other or self._used + flat.numel() > self._size:
            self._flush()
        if flat.numel() > self._size:
            size = max(flat.numel(), self.transport.bucket_bytes)
            self._buffer = None  # before the larger one is there
            self._buffer, self._handles = self.transport.stage(size)
        assert self._buffer is not None
        self._buffer[self._used : self._used + flat.numel()].copy_(flat)
        self._used += flat.numel()
        self._parts.append((name, torch.empty_like(tensor, device="meta")))

    def finish(self) -> None:
        self._flush()
        self._tell(lambda engine: engine.finish_weights())
        self.transport.wait_for_each_other()  # the workers have let go of the buffers on every GPU
        self._buffer = None
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
        _give_cache_back()
        if self._error is not None:
            raise self._error

    @property
    def _size(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    def _flush(self) -> None:
        if not self._parts:
            return
        self.transport.wait_for_each_other()
        update = update_info(self._parts, self._handles)
        self._tell(lambda engine: engine.take_weights(update))
        self.transport.wait_for_each_other()  # the workers have copied what was in the buffer
        self._parts, self._used = [], 0

    def _tell(self, action: Callable[[RolloutEngine], None]) -> None:
        """Have the engine do something; after a failure nothing more, until the others are done."""
        if self.engine is None or self._error is not None:
            return
        try:
            action(self.engine)
        except TrainingError as error:
            self._error = error


def update_info(
    parts: Iterable[tuple[str, Tensor]], handles: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """One buffer as vLLM's ``IPCWeightTransferUpdateInfo`` takes it, for its packed transfer.

    Args:
        parts: names and (meta) tensors in the order in which they lie in the buffer.
        handles: of the buffer on each GPU, by the GPU's UUID.
    """
    parts = list(parts)
    return {
        "names": [name for name, _ in parts],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in parts],
        "shapes": [list(tensor.shape) for _, tensor in parts],
        "tensor_sizes": [tensor.nbytes for _, tensor in parts],
        "ipc_handles": handles,
    }


def export_by_ipc(tensor: Tensor) -> tuple[Any, ...]:
    """Arguments of torch's ``rebuild_cuda_tensor``, which opens the tensor in another process."""
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(tensor)[1]


def device_groups(seats: Sequence[Seat]) -> dict[int, tuple[int, ...]] | str:
    """The ranks that sit on the GPUs of each engine, by its owner.

    Args:
        seats: of all ranks, by rank.

    Returns:
        The groups, or why weights cannot go from GPU to GPU.
    """
    groups: dict[int, tuple[int, ...]] = {}
    for owner, seat in enumerate(seats):
        if not seat.engine_gpus:
            continue
        if seat.device is None:
            return "no CUDA"
        ranks = tuple(range(owner, owner + seat.engine_gpus))
        for offset, rank in enumerate(ranks):
            there = seats[rank] if rank < len(seats) else None
            wanted = (seat.host, seat.device + offset)
            if there is None or (there.host, there.device) != wanted or not there.uuid:
                return (
                    f"GPU {seat.device + offset} of the engine of rank {owner} on {seat.host} is "
                    f"not that of rank {rank}"
                )
        groups[owner] = ranks
    taken = [rank for ranks in groups.values() for rank in ranks]
    if len(taken) > len(set(taken)):
        return "engines share GPUs"
    return groups


def this_seat(engine: RolloutEngine | None, host: str) -> Seat:
    """The seat of this process."""
    device, uuid = None, ""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    if engine is None:
        return Seat(host, device, uuid)
    return Seat(host, device, uuid, engine.gpus, engine.forgets, engine.weight_bytes)


_LONGEST_WAIT = timedelta(days=1)
"""Above every watchdog's, for a torch that does not say how long the default group waits."""


def _timeout() -> timedelta:
    """That of the default group, which is above the watchdog's; torch gives new ones its own."""
    world = dist.group.WORLD
    assert world is not None
    try:
        # Torch says it nowhere in public.
        found: timedelta = world._get_backend(world._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return _LONGEST_WAIT
    return found


def _give_cache_back() -> None:
    """What torch keeps for later is memory that the waking engine needs."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def fixed_segments() -> Iterator[None]:
    """Have torch allocate outside of expandable segments, which not every process may open.

    Torch takes no free block of such a segment either while they are off.
    """
    settings = torch._C._accelerator_getAllocatorSettings().replace(" ", "")
    if _EXPANDABLE not in settings:
        yield
        return
    # Torch forgets whatever the new string does not name.
    torch._C._accelerator_setAllocatorSettings(settings.replace(_EXPANDABLE, _FIXED))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)
