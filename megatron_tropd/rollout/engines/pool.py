"""The engines of a run: which rank owns one, and how all ranks use them together."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.collective import run_and_share, run_everywhere
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.transports import (
    DeviceTransport,
    FolderTransport,
    Seat,
    WeightTransport,
    device_groups,
    export_by_ipc,
    this_seat,
)
from megatron_tropd.rollout.weights.interface import NamedTensor, WeightChannel
from megatron_tropd.rollout.weights.mailbox import roomy_root

Transport = Literal["auto", "folder"]


class _PoolChannel:
    """The way of weights to the engines of a pool."""

    def __init__(
        self, give: Callable[[Iterable[NamedTensor]], None], receivers: tuple[int, ...]
    ) -> None:
        self._give = give
        self.receivers, self.version = receivers, 0

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Give every engine the weights."""
        self._give(tensors)
        self.version = version


class EnginePool:
    """One engine on the first rank of each of ``num_engines`` equal blocks of the world.

    They are :class:`~megatron_tropd.rollout.engines.interface.SamplingEngines`. A failure of one
    engine is raised on all ranks.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        num_engines: int,
        make_engine: Callable[[int], RolloutEngine],
        transport: Transport | None = "auto",
    ) -> None:
        """Start this rank's engine, if it owns one.

        Args:
            world_size: divisible by ``num_engines``.
            make_engine: called with the engine's number on the rank that owns it.
            transport: of new weights: from GPU to GPU if each GPU of an engine is that of a rank
                ("auto"), or through a folder; None: they keep the weights they start with.

        Raises:
            ConfigError: an engine cannot be made, or shared memory has no room for the weights.
        """
        block = world_size // num_engines
        self.owners = tuple(range(0, world_size, block))
        self._number = rank // block if rank in self.owners else None
        self._engine: RolloutEngine | None = None
        self._transport: WeightTransport | None = None
        self._awake = self._asked = False
        self._settled: list[Sample] | None = None
        self._tensors: Iterable[NamedTensor] = iter(())
        self._filled = True
        """Whether the engines have weights; those that they start with, at first."""
        seats = run_everywhere(lambda: self._make(make_engine))
        self._forgetful = any(seat.forgets for seat in seats)
        if transport is not None:
            self._transport = _open_transport(seats, rank, transport)
        receivers = self._transport.receivers if self._transport else ()
        self.channel: WeightChannel = _PoolChannel(self._give, receivers)

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request, spread evenly over the engines.

        Collectives: those of :func:`run_and_share`; as many more where others were asked for
        before, and those of the tensors where the engines dropped their weights.
        """
        self._settle()
        self._fill()
        batches = self._cut(requests)
        samples = merge_batches(
            run_and_share(lambda: self._generate(batches, sampling), self.owners)
        )
        self._slept()
        return samples

    def on_engines[T](self, action: Callable[[int, RolloutEngine], T]) -> list[T]:
        """Have each engine's rank do something with it; what came of it, on every rank.

        Args:
            action: given the engine's number and the engine.

        Collectives: those of :func:`run_and_share`, and those of the tensors where the engines
        dropped their weights.
        """
        self._settle()
        self._fill()

        def mine() -> T | None:
            if self._engine is None or self._number is None:
                return None
            with self._asleep_after():
                return action(self._number, self._engine)

        found = run_and_share(mine, self.owners)
        self._slept()
        return cast(list[T], found)

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Ask for samples without waiting; one call at a time may be under way.

        Args and errors as :meth:`generate`.

        Collectives: one gather of the outcome, and those of the tensors where the engines dropped
        their weights.
        """
        assert not self._asked, "start before finish"
        self._fill()
        batches = self._cut(requests)

        def mine() -> None:
            if self._engine is not None and self._number is not None:
                self._engine.start_generate(batches[self._number], sampling)

        run_everywhere(mine)
        self._asked, self._settled = True, None

    def finish(self) -> list[Sample]:
        """The samples of the last :meth:`start`, on every rank.

        Collectives: those of :func:`run_and_share`.
        """
        assert self._asked, "finish without start"
        self._settle()
        samples, self._asked, self._settled = self._settled, False, None
        assert samples is not None
        return samples

    def arrived(self) -> list[Sample] | None:
        """Of one engine on this rank; those of several meet in :meth:`finish`."""
        if self._engine is None or len(self.owners) > 1 or not self._asked:
            return None
        return self._settled or self._engine.arrived()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the engines' memory in the block; on the way out it is the trainer's again.

        Every call that returns samples does so by itself outside of such a block. An engine wakes
        by itself: its memory for weights to take them, its cache to generate.

        Collectives: one gather of the outcome.
        """
        assert not self._awake, "awake within awake"
        self._awake = True
        try:
            yield
            self._settle()
        except BaseException:
            self._awake = False
            if not self._asked:  # else it is busy
                with suppress(TrainingError):  # it may be gone: the first error says why
                    self._sleep()
            raise
        self._awake = False
        run_everywhere(self._sleep)
        self._slept()

    def close(self) -> None:
        """End this rank's engine; not collective, harmless twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, make_engine: Callable[[int], RolloutEngine]) -> Seat:
        if self._number is not None:
            self._engine = make_engine(self._number)
        return this_seat(self._engine, socket.gethostname())

    def _sleep(self) -> None:
        """Have this rank's engine give its memory back, unless a block keeps it."""
        if self._engine is not None and not self._awake:
            self._engine.sleep()

    def _slept(self) -> None:
        self._filled = self._filled and (self._awake or not self._forgetful)

    def _fill(self) -> None:
        """Give engines that slept since they got their weights the same ones again."""
        if self._filled:
            return
        if isinstance(self._tensors, Iterator):
            raise TrainingError(
                "Engines dropped their weights when they slept and have been given none since that "
                "can be given again.",
                kind="engine",
            )
        run_everywhere(lambda: self._load(self._tensors))
        self._filled = True

    def _give(self, tensors: Iterable[NamedTensor]) -> None:
        """Collectives: those of ``tensors``, a gather of the outcome, and those of
        :func:`run_and_share` for samples that are still being made: they are of the weights before.
        """
        self._settle()
        self._tensors = tensors
        run_everywhere(lambda: self._load(tensors))
        self._filled = True

    def _load(self, tensors: Iterable[NamedTensor]) -> None:
        assert self._transport is not None, "these engines keep the weights they start with"
        self._transport.send(iter(tensors), self._engine)

    def _cut(self, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
        return cut_batches(requests, len(self.owners))

    def _generate(self, batches: list[list[SampleRequest]], sampling: Sampling) -> list[Sample]:
        if self._engine is None or self._number is None:
            return []
        with self._asleep_after():
            return self._engine.generate(batches[self._number], sampling)

    def _fetch(self) -> list[Sample]:
        if self._engine is None:
            return []
        with self._asleep_after():
            return self._engine.finish_generate()

    @contextmanager
    def _asleep_after(self) -> Iterator[None]:
        """Every way of sampling goes through here, so that none can leave an engine awake."""
        try:
            yield
        except BaseException:
            with suppress(TrainingError):  # it may be gone: the first error says why
                self._sleep()
            raise
        self._sleep()

    def _settle(self) -> None:
        """Wait for samples that were asked for and keep them: engines do one thing at a time."""
        if not self._asked or self._settled is not None:
            return
        self._settled = merge_batches(run_and_share(self._fetch, self.owners))
        self._slept()


def _open_transport(seats: Sequence[Seat], rank: int, kind: Transport) -> WeightTransport:
    """The way of the weights; collective."""
    mine, owners = seats[rank], [number for number, seat in enumerate(seats) if seat.engine_gpus]
    groups = device_groups(seats) if kind == "auto" else "rollout.weight_transport = folder"
    if not isinstance(groups, str) and mine.device is not None:
        device = torch.device("cuda", mine.device)
        return DeviceTransport(
            groups, rank=rank, uuid=mine.uuid, device=device, export=export_by_ipc
        )
    if mine.device is not None and rank == 0:
        print(f"Weights go to the engines through shared memory: {groups}.", flush=True)
    here = [seat for seat in seats if seat.host == mine.host and seat.engine_gpus]

    def root() -> Path | None:
        return roomy_root(len(here), mine.weight_bytes) if mine.engine_gpus else None

    # Together: ranks whose node has room must not wait for one whose node has none.
    return FolderTransport(owners, run_everywhere(root)[rank])


def cut_batches[T](requests: Sequence[T], count: int) -> list[list[T]]:
    """Cut into ``count`` batches, by index alone: batch i has requests i, i + count, ..."""
    return [list(requests[number::count]) for number in range(count)]


def merge_batches[T](batches: Sequence[Sequence[T]]) -> list[T]:
    """Inverse of :func:`cut_batches`."""
    merged: list[Any] = [None] * sum(map(len, batches))
    for number, batch in enumerate(batches):
        merged[number :: len(batches)] = batch
    return merged
