"""Megatron's asynchronous save, with a thread of the rank as the background writer.

Megatron-Core 0.19 brings two writers of its own. One forks the rank, with its threads, sockets and
CUDA context; the other spawns a process that needs a CUDA device. A thread needs neither, and what
it does (writing, fsync, checksums) leaves Python to the training thread.
"""

import os
import queue
import threading
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCaller,
    AsyncCallsQueue,
    AsyncRequest,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_tropd.mcore.checksums import Checksum, DigestedFile


class ThreadCaller(AsyncCaller):
    """Writes this rank's files of one request in a thread, and digests what it writes."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._thread: threading.Thread | None = None
        self.reason: str | None = None
        """Why writing failed; Megatron itself only logs it."""
        self.checksums: dict[str, Checksum] = {}
        """By file name, once done."""

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy the tensors to memory nobody else changes, then start the thread."""
        if async_req.async_fn is None:  # nothing to write on this rank
            return
        _, buckets, results = async_req.async_fn_args
        # Megatron holds on to this list until the save is complete: device memory is free at once.
        buckets[:] = _staged(async_req, buckets)
        arguments = (async_req.async_fn, buckets, results)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.daemon = True  # a stopped rank leaves an unfinished folder, not a process
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank's thread is done; collective unless ``no_dist``."""
        if blocking and self._thread is not None:
            self._thread.join()
        alive = self._thread is not None and self._thread.is_alive()
        return not alive if no_dist else self.sync_all_async_calls(int(alive))

    def close(self, abort: bool = False) -> None:
        """Wait for the thread, unless ``abort``."""
        if self._thread is not None and not abort:
            self._thread.join()

    def __del__(self) -> None:
        """Nothing to end: the thread is a daemon."""

    def _run(self, write: Any, buckets: list, results: queue.Queue) -> None:
        # What Megatron's own function for this does, but for the checksums and for the reason of a
        # failure: it only logs that, and its writer names not even the error of the file system.
        transforms, _ = write.args
        try:
            written = {}
            for index, bucket in enumerate(buckets):
                written[index], digest = _written(transforms, bucket)
                self.checksums[Path(bucket[0]).name] = digest
            results.put(written)
        except Exception as error:  # whatever it is, the training thread must hear of it
            self.reason = _cause(error)
            results.put(RuntimeError(self.reason))


class SaveQueue(AsyncCallsQueue):
    """Megatron's queue of saves in flight, with threads as writers."""

    def start(self, request: AsyncRequest) -> ThreadCaller:
        """Begin to write; the caller polls :meth:`maybe_finalize_async_calls`."""
        self.schedule_async_request(request)
        caller = self.async_calls[-1].async_caller
        assert isinstance(caller, ThreadCaller)
        return caller

    def _get_async_caller(self) -> AsyncCaller:
        return ThreadCaller()


def forget_results() -> None:
    """Give Megatron's writer a fresh queue for its results; before each save.

    Megatron keeps the queue between saves: after a failure it would hold old results. And a plain
    queue serves a thread; Megatron's own is a manager process per rank (5-18 s at the first save).
    """
    filesystem_async._results_queue = queue.Queue()


def _written(transforms: Any, bucket: Any) -> tuple[list[Any], Checksum]:
    """Write one file, until it is on disk: what torch notes of each item, and the checksum."""
    path, key, (raw, tensors) = bucket
    with open(path, "wb") as file:
        stream: Any = DigestedFile(file)
        write_item: Any = _write_item  # newer versions of torch take transforms first
        results = [
            write_item(*transforms, stream, data, item, key, SerializationFormat.TORCH_SAVE)
            for item, data in (*raw, *tensors)
        ]
        file.flush()
        os.fsync(file.fileno())
    return results, stream.checksum()


def _cause(error: BaseException) -> str:
    """The error of the file system behind what the zip writer makes of it."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return str(link) if link is not None else f"{type(error).__name__}: {error}"


def _staged(request: AsyncRequest, buckets: list) -> list:
    """The write buckets in host memory of their own; training goes on with the originals."""
    copies = request.preload_fn() if request.preload_fn is not None else buckets
    live = {id(tensor) for _, _, (_, tensors) in buckets for _, tensor in tensors}
    return [
        # On the CPU Megatron's staging hands back the live tensors themselves.
        (path, key, (raw, [(item, t.clone() if id(t) in live else t) for item, t in tensors]))
        for path, key, (raw, tensors) in copies
    ]
