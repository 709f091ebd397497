"""Megatron's ``torch_dist`` folders, one tensor in memory at a time.

Megatron's own writer resolves every tensor before it writes the first. The format is that of torch
DCP, whose writer asks a planner for each tensor when its turn comes: so here a tensor is made,
written and forgotten. Reading goes the same way: ``.metadata`` says where each chunk lies, and a
chunk is read when it is asked for.

Nothing in a folder is executed: ``.metadata`` and ``common.pt`` are pickles, of which only the
listed plain classes are accepted.
"""

import io
import json
import os
import pickle
import threading
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import lfs_pointer
from megatron_tropd.convert.budget import Budget

METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"


@dataclass(frozen=True)
class Part:
    """One chunk to write: ``tensor[offset]`` of a stored tensor, made when its turn comes."""

    key: str
    size: tuple[int, ...]
    """Shape of the stored tensor."""
    lead: tuple[int, ...]
    """Position of the chunk in the leading dimensions."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Returns the chunk without leading dimensions; may run in any thread."""


def write_checkpoint(
    folder: Path,
    parts: list[Part],
    objects: list[str],
    common: Mapping[str, Any],
    *,
    workers: int = 2,
) -> None:
    """Write a checkpoint that ``megatron.core.dist_checkpointing.load`` reads.

    Args:
        parts: chunks; together they cover their tensors.
        objects: unique names of sharded objects, each written as None.
        common: what is not sharded; plain values.
        workers: threads, each with a file of its own; together they hold two largest chunks.

    Raises:
        OSError, RuntimeError: writing failed; what is there is incomplete.
        Whatever a part's ``make`` raises.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.save(
                {},
                storage_writer=_Writer(folder, thread_count=workers),
                planner=_Planner(parts, objects),
                no_dist=True,
            )
    except CheckpointException as error:
        # No Exception, and it hides what happened in a dictionary.
        raise _cause(next(iter(error.failures.values()))[0]) from None
    with (folder / COMMON).open("wb") as file:
        torch.save(dict(common), file)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / BACKEND).write_text(json.dumps(backend))


def _cause(error: BaseException) -> BaseException:
    """The full disk behind what torch says of it ("unexpected pos")."""
    context: BaseException | None = error
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return context or error


class _Planner(SavePlanner):
    """Names the chunks first, and makes each one only when the writer asks for it."""

    def __init__(self, parts: list[Part], objects: list[str]) -> None:
        self._items = [_write_item(part) for part in parts]
        self._make = {item.index: part.make for item, part in zip(self._items, parts, strict=True)}
        self._objects = [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in objects
        ]
        buffer = io.BytesIO()
        torch.save([None], buffer)
        self._nothing = buffer.getvalue()

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """There is no state dict: :meth:`resolve_data` makes what is written."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(items=self._items + self._objects)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._nothing)
        tensor = self._make[write_item.index]()
        data = write_item.tensor_data
        assert data is not None
        return tensor.view(tuple(data.chunk.sizes))


def _write_item(part: Part) -> WriteItem:
    leads = len(part.lead)
    offset = torch.Size([*part.lead, *[0] * (len(part.size) - leads)])
    sizes = torch.Size([*[1] * leads, *part.size[leads:]])
    return WriteItem(
        index=MetadataIndex(part.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, sizes),
            properties=TensorProperties(dtype=part.dtype),
            size=torch.Size(part.size),
        ),
    )


class _Writer(checkpoint.FileSystemWriter):
    """torch's writer, but it forgets what it has written, an error in any thread ends it, and it
    names no folder or save.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        assert isinstance(planner, _Planner)
        prefix = plan.storage_data.prefix
        stop = threading.Event()
        # One iterator of a list: threads take turns at it.
        items, budget = iter(plan.items), Budget(max(map(_nbytes, plan.items)))
        write = partial(self._write_file, items, stop, planner, budget)
        with ThreadPoolExecutor(self.thread_count) as pool:
            jobs = [pool.submit(write, f"{prefix}{n}.distcp") for n in range(self.thread_count)]
            try:
                wait(jobs)
            except KeyboardInterrupt:
                stop.set()
                raise
        failures = [error for job in jobs if (error := job.exception())]
        if failures:
            raise failures[0]
        done: torch.futures.Future = torch.futures.Future()
        done.set_result([result for job in jobs for result in job.result()])
        return done

    def _write_file(
        self,
        items: Iterator[WriteItem],
        stop: threading.Event,
        planner: "_Planner",
        budget: Budget,
        name: str,
    ) -> list[Any]:
        """Write what is left of ``items`` to one file; an error stops all threads."""
        results = []
        try:
            with Path(self.path, name).open("wb") as stream:
                for item in items:
                    if stop.is_set():
                        break
                    with budget.holding(_nbytes(item)):
                        results.append(self._write_item(stream, planner, item, name))
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            stop.set()
            raise
        return results

    def _write_item(self, stream: Any, planner: "_Planner", item: WriteItem, name: str) -> Any:
        data = planner.resolve_data(item)
        form = self.serialization_format
        return filesystem._write_item(self.transforms, stream, data, item, name, form)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return prod(data.chunk.sizes) * data.properties.dtype.itemsize if data else 1


class TorchDistReader:
    """Tensors of one ``torch_dist`` folder (``release``, ``iter_0000100``, ``step_000100``).

    Raises:
        InputError: it is no such folder, or ``.metadata`` holds something that is not data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = _read_metadata(folder / METADATA)
        stored = metadata.state_dict_metadata
        self._tensors = {
            name: entry
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._where: Mapping[MetadataIndex, Any] = metadata.storage_data
        self.objects = frozenset(stored.keys() - self._tensors.keys())
        """Names of what is stored besides tensors."""
        self._check_files()

    @property
    def names(self) -> frozenset[str]:
        """Names of all stored tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the metadata."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor, from the metadata."""
        return self._tensors[name].properties.dtype

    def read(self, name: str, lead: tuple[int, ...] = ()) -> Tensor:
        """Read ``tensor[lead]``, whatever the layout that wrote it.

        Args:
            lead: position in its leading dimensions; (): the whole tensor.

        Raises:
            InputError: a file is missing, truncated or damaged (its checksum is wrong).
        """
        stored = self._tensors[name]
        rest = tuple(stored.size)[len(lead) :]
        wanted = ChunkStorageMetadata(
            torch.Size([*lead, *[0] * len(rest)]), torch.Size([*[1] * len(lead), *rest])
        )
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        if sum(prod(item.lengths) for item in items) != prod(rest):
            raise InputError(f"{self.folder} holds only parts of {name}. Write it again.")
        if len(items) == 1:
            return self._chunk(items[0]).reshape(rest)
        whole = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        for item in items:
            _narrow(whole, item.dest_offsets, item.lengths).copy_(self._chunk(item))
        return whole.reshape(rest)

    def check(self, names: Iterable[str], *, part: int = 0, parts: int = 1) -> None:
        """Read every ``parts``-th chunk of some tensors and compare its checksum.

        Raises:
            InputError: a file is damaged.
        """
        chunks = [(name, chunk) for name in sorted(names) for chunk in self._tensors[name].chunks]
        for name, chunk in chunks[part::parts]:
            for item in create_read_items_for_chunk_list(name, self._tensors[name], [chunk]):
                self._chunk(item)

    def common(self) -> dict[str, Any]:
        """What is stored unsharded (arguments, iteration); plain values only."""
        path = self.folder / COMMON
        if path.exists():
            return _safe_load(path.open("rb"), path)
        index = MetadataIndex("common_state/shard_0_1")
        if index not in self._where:
            return {}
        info = self._where[index]
        return _safe_load(io.BytesIO(self._bytes(info)), self.folder / info.relative_path)[0]

    def _chunk(self, item: Any) -> Tensor:
        info = self._where[item.storage_index]
        path = self.folder / info.relative_path
        with path.open("rb", buffering=0) as file:
            view = io.BufferedReader(_Slice(file, info.offset, info.length))
            try:
                tensor = torch.load(view, map_location="cpu", weights_only=True)
                expected = _stored_crc(view)
            except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
                raise InputError(self._damaged(path, item, str(error))) from None
        found = zlib.crc32(_bytes(tensor.untyped_storage()))
        if expected not in (None, found):
            raise InputError(self._damaged(path, item, "its checksum is wrong"))
        return _narrow(tensor, item.storage_offsets, item.lengths)

    def _damaged(self, path: Path, item: Any, reason: str) -> str:
        first = reason.splitlines()[0] if reason else "unreadable"
        return (
            f"{path} is damaged where it holds {item.storage_index.fqn} "
            f"{list(item.storage_index.offset or [])}: {first}. Restore the file or convert again."
        )

    def _bytes(self, info: Any) -> bytes:
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def _check_files(self) -> None:
        """Every file must reach as far as its last chunk does."""
        ends: dict[str, int] = {}
        for info in self._where.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise InputError(f"{path} is missing: {self.folder} is not a complete checkpoint.")
            if path.stat().st_size < end:
                raise InputError(
                    lfs_pointer(path)
                    or f"{path} must have at least {end} bytes, found {path.stat().st_size} "
                    "(truncated copy?). Restore the file or convert again."
                )


class _Slice(io.RawIOBase):
    """Part of an open file as a file of its own (torch's own refuses reads beyond the end)."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._length - self._position)]
        count = os.preadv(self._file.fileno(), [room], self._offset + self._position)
        self._position += count
        return count


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    if not storage.nbytes():
        return memoryview(b"")
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def _stored_crc(view: Any) -> int | None:
    """The checksum torch.save wrote beside a tensor's bytes; None if it was switched off."""
    with zipfile.ZipFile(view) as archive:
        records = [r for r in archive.infolist() if r.filename.endswith("/data/0")]
    # torch writes 0 when checksums are off.
    return records[0].CRC or None if len(records) == 1 else None


_CHECKPOINT = "torch.distributed.checkpoint."
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_PLAIN = {
    f"{_CHECKPOINT}metadata": """Metadata MetadataIndex TensorStorageMetadata TensorProperties
        BytesStorageMetadata ChunkStorageMetadata StorageMeta _MEM_FORMAT_ENCODING""",
    # Megatron keeps the plans of its ranks there too.
    f"{_CHECKPOINT}planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    f"{_CHECKPOINT}filesystem": "_StorageInfo _StoragePrefix",
    _SHARDED: "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
    "collections": "OrderedDict defaultdict",
}
"""Module -> classes (and one function) that only hold data."""
_OLD = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}


class _PlainUnpickler(pickle.Unpickler):
    """Accepts what a ``.metadata`` file is made of and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, "").split():
            return super().find_class(module, name)
        if module == _MEGATRON and name in _OLD:
            return _OLD[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: {path.parent} is no complete torch_dist checkpoint."
        ) from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(lfs_pointer(path) or f"{path} cannot be read: {error}") from None
    if not isinstance(metadata, Metadata) or not metadata.storage_data:
        raise InputError(f"{path} is not the metadata of a torch_dist checkpoint.")
    return metadata


def _safe_load(file: Any, path: Path) -> Any:
    try:
        with file, torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            lfs_pointer(path) or f"{path} cannot be read as plain data: {reason}"
        ) from None
