"""The trainer's side of direct weights: who takes part in a broadcast, and the folder beside it.

Only rank 0 comes here. What is sent is written into the folder of versions too, in a thread, for
servers that were not there and for those whose connection breaks.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

from torch import Tensor

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.rollout.engines import wire
from megatron_tropd.rollout.engines.client import ClientSettings, ServerClient, ServerError
from megatron_tropd.rollout.weights.broadcast import (
    BroadcastBroken,
    Bucket,
    Sender,
    buckets,
    local_address,
)
from megatron_tropd.rollout.weights.weight_sync import WeightsName, WeightVersions

_ANSWER_SECONDS = 5.0
"""A server that says nothing for so long gets its weights from the folder."""
_LOAD_SECONDS = 60.0
"""Longest wait for engines that were sent everything to have it in place."""


class DirectTransport:
    """Broadcasts versions of the weights to the servers that are ready, and writes the folder."""

    def __init__(
        self,
        known: ClientSettings,
        versions: WeightVersions,
        *,
        num_servers: int,
        join_seconds: float,
    ) -> None:
        """Nothing happens yet.

        Args:
            known: how servers are found and recognised.
            versions: the folder.
            num_servers: ``rollout.num_engines``.
            join_seconds: longest wait for an engine whose server was told.
        """
        seconds = min(known.answer_seconds, _ANSWER_SECONDS)
        self._known = dataclasses.replace(known, answer_seconds=seconds)
        self._versions = versions
        self._count = num_servers
        self._join_seconds = join_seconds
        self._writing: _BackgroundWrite | None = None

    def hand_over(
        self, name: WeightsName, tensors: Iterable[tuple[str, Tensor | None]]
    ) -> set[int]:
        """Give a version to every server that is ready.

        Over when each server has it; where one was not ready, when it is in the folder.

        Args:
            name: of the version.
            tensors: HF names and tensors on any device.

        Returns:
            Numbers of the servers that have it now.

        Raises:
            TrainingError: the folder could not be written: of this version where a server needs
                it, of the one before in any case.
        """
        self.finish()
        self._writing = writing = _BackgroundWrite(self._versions, name)
        with _Broadcast(self._known, self._count, name, self._join_seconds) as broadcast:
            try:
                for bucket in buckets(tensors):
                    writing.put(bucket)
                    broadcast.send(bucket)
                    if not broadcast.goes_on:  # nobody waits for a bucket, all for the folder
                        writing.start()
            except BaseException:
                writing.abandon()
                raise
            writing.end()
            writing.start()
            if broadcast.broken:  # who had begun waits for the folder
                writing.wait()
            taken = broadcast.finish()
        if len(taken) < self._count:
            writing.wait()
        return taken

    def finish(self) -> None:
        """Wait until the last version is in the folder.

        Raises:
            TrainingError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()

    def close(self) -> None:
        """End what is still being written, after the file at hand: nobody needs it any more."""
        if self._writing is not None:
            self._writing.abandon()
            with contextlib.suppress(TrainingError):
                self.finish()


class _Broadcast:
    """One version on its way to whoever is ready. A context manager: leaving it ends all talks.

    A thread for each server tells it and hears how it ended, so that one that dies is known.
    """

    def __init__(
        self, known: ClientSettings, count: int, name: WeightsName, join_seconds: float
    ) -> None:
        self._name = name
        self._join_seconds = join_seconds
        self._clients = [ServerClient(known, number) for number in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self._outcomes: dict[int, Future[None]] = {}
        self._sender: Sender | None = None
        self._begun = self._left = self.broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._threads.shutdown(wait=False)
        if self._sender is not None:
            self._sender.close()

    @property
    def goes_on(self) -> bool:
        """Whether somebody takes part."""
        return self._sender is not None and bool(self._sender.members) and not self.broken

    def send(self, bucket: Bucket) -> None:
        """Send a bucket if anybody takes part; the first one also brings them together."""
        try:
            if not self._begun:
                self._begun = True
                self._meet(cuda=bucket.flat.is_cuda)
            if self._sender is not None and self.goes_on:
                self._sender.send(bucket)
        except BroadcastBroken as error:
            print(f"{self._name}: {error}; the rest goes through the folder", flush=True)
            self.broken = True
            if self._sender is not None:
                self._sender.end(complete=False)

    def finish(self) -> set[int]:
        """Numbers of the servers that have everything; the others are named in the log."""
        if self._sender is None:
            return set()
        if not self.broken:
            self._sender.end(complete=True)
        wait([self._outcomes[number] for number in self._sender.members], _LOAD_SECONDS)
        taken = set()
        for number, outcome in self._outcomes.items():
            why = outcome.exception() if outcome.done() else "did not take them in time"
            if why is None:
                taken.add(number)
            else:
                print(f"{self._name}: rollout server {number} {why}", flush=True)
        return taken

    def _meet(self, *, cuda: bool) -> None:
        addresses = dict(enumerate(self._threads.map(_way_to, self._clients)))
        ready = [number for number, address in addresses.items() if address is not None]
        if not ready:
            return
        # Somebody on this machine reaches us by the address that others need, not so vice versa.
        ways = sorted(addresses[n] or "" for n in ready)
        address = next((way for way in ways if not way.startswith("127.")), ways[0])
        self._sender = Sender(address)
        for number in ready:
            offer = self._sender.offer(self._name, number, self._join_seconds)
            self._outcomes[number] = self._threads.submit(self._tell, number, offer)
        self._sender.gather(ready, seconds=self._join_seconds, cuda=cuda, lost=self._lost)

    def _tell(self, number: int, offer: wire.Offer) -> None:
        client = self._clients[number]
        try:
            client.hand_over(offer, wanted=lambda: not self._left)
        finally:
            client.close()

    def _lost(self) -> set[int]:
        return {number for number, outcome in self._outcomes.items() if outcome.done()}


def _way_to(client: ServerClient) -> str | None:
    """This machine's address towards a server that is ready; None: it is not."""
    try:
        return local_address(client.host()) if client.state() == "ready" else None
    except (ServerError, OSError):
        return None


class _BackgroundWrite:
    """A version on its way into the folder, in a thread; older ones are removed before."""

    def __init__(self, versions: WeightVersions, name: WeightsName) -> None:
        self._versions = versions
        self._name = name
        self._arriving: queue.SimpleQueue[Bucket | None] = queue.SimpleQueue()
        self._abandoned = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write, where that has not begun: it takes cores and memory from a broadcast."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def put(self, bucket: Bucket) -> None:
        """Have a bucket written; copied to the host first."""
        self._arriving.put(Bucket(bucket.flat.cpu(), bucket.shapes))

    def end(self) -> None:
        """That was the last one."""
        self._arriving.put(None)

    def abandon(self) -> None:
        """Nothing of this version is to be left in the folder."""
        self._abandoned = True
        self.end()
        self.start()

    def wait(self) -> None:
        """Wait until the version is there.

        Raises:
            TrainingError: it could not be written.
        """
        assert self._thread is not None, "wait before start"
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        try:
            self._versions.prune(self._name.version, self._name.version)
            self._versions.write(self._name, self._tensors())
        except Exception as error:  # raised where somebody waits
            self._error = error

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        while not self._abandoned and (bucket := self._arriving.get()) is not None:
            yield from bucket.tensors()
        if self._abandoned:
            raise TrainingError("the trainer stopped in the middle")
