"""New weights from the trainer straight into the engines: one broadcast over a group of its own.

Rank 0 of the trainer opens a store on one address. Every worker of every engine that was told of it
writes itself down there; whoever is in time becomes a member, and the members make a process group:
NCCL where all of them are on CUDA, gloo otherwise. The weights then go round in buckets: what is in
a bucket through the store, its bytes through the group. Group and store live for one version, so
whoever dies, comes back or is new concerns that version alone.

A member whose connection breaks in the middle takes the rest from the folder of
:class:`~megatron_tropd.rollout.weights.weight_sync.WeightVersions`, which rank 0 writes beside. So
what was begun ends with the same bits, or with an error that ends the engine.
"""

import contextlib
import itertools
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.rollout.engines.engine import check_complete
from megatron_tropd.rollout.engines.wire import Offer
from megatron_tropd.rollout.weights.weight_sync import (
    BUCKET_BYTES,
    VISIBLE_SECONDS,
    WeightsName,
    WeightVersions,
)

Shape = tuple[int, ...]

_SLOWEST = 8 * 2**20
"""Bytes per second below which a broadcast is given up."""
_PATIENCE_SECONDS = 30.0
"""Longest wait for anything else: a message, a connection, a bucket to be gathered."""
_POLL_SECONDS = 0.001
_LOOK_SECONDS = 0.5
"""How often is looked whether the other side still lives."""


class BroadcastBroken(RuntimeError):
    """A member is gone or too slow: what is missing comes from the folder."""


@dataclass(frozen=True)
class Bucket:
    """Some tensors of one dtype, one after the other."""

    flat: Tensor
    """[n] their values."""
    shapes: dict[str, Shape]
    """By name, in their order."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors, as views."""
        parts = self.flat.split(list(map(math.prod, self.shapes.values())))
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            yield name, part.view(shape)


class Sender:
    """Rank 0's side of one broadcast."""

    def __init__(self, address: str) -> None:
        """Open the store.

        Args:
            address: of this machine, by which the servers reach it; nothing listens on others.

        Raises:
            BroadcastBroken: it cannot be opened.
        """
        self._address = address
        self._key = uuid.uuid4().hex
        self.members: list[int] = []
        """Numbers of the servers that take part."""
        with _broken(f"no store on {address}"):
            listener = socket.create_server((address, 0))
            self._port = int(listener.getsockname()[1])
            store = dist.TCPStore(
                address,
                self._port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=_PATIENCE_SECONDS),
                master_listen_fd=listener.detach(),
            )
        self._store: Any = dist.PrefixStore(self._key, store)
        self._group: Any = None
        self._cuda = False
        self._alive: Callable[[], bool] = lambda: True
        self._said = 0

    def offer(self, name: WeightsName, server: int, seconds: float) -> Offer:
        """What a server must know to take part."""
        return Offer(
            id=f"{self._key}-{server}",
            weights=name,
            host=self._address,
            port=self._port,
            key=self._key,
            server=server,
            join_seconds=seconds,
        )

    def gather(
        self,
        servers: Sequence[int],
        *,
        seconds: float,
        cuda: bool,
        lost: Callable[[], set[int]] = set,
    ) -> None:
        """Wait for the engines of ``servers``, then make the group of those that came.

        Args:
            servers: their numbers.
            seconds: longest wait.
            cuda: whether what will be sent is on CUDA.
            lost: numbers of which it is known by now that they will not come.

        Raises:
            BroadcastBroken: the group did not come about.
        """
        with _broken("the engines did not meet"):
            here = self._arrivals(servers, time.monotonic() + seconds, lost)
            self.members = sorted(here)
            ends = list(itertools.accumulate((here[n][0] for n in self.members), initial=1))
            self._cuda = cuda and all(on_cuda for _, on_cuda in here.values())
            members = {
                "ranks": dict(zip(map(str, self.members), ends[:-1], strict=True)),
                "size": ends[-1],
                "cuda": self._cuda,
            }
            self._alive = lambda: lost().isdisjoint(self.members)
            self._store.set("members", json.dumps(members))
            if self.members:
                self._group = _make_group(self._store, 0, members, self._address)

    def send(self, bucket: Bucket) -> None:
        """Broadcast one bucket.

        Raises:
            BroadcastBroken: a member is gone or too slow.
        """
        with _broken("a bucket was not sent"):
            dtype = str(bucket.flat.dtype).removeprefix("torch.")
            self._say({"dtype": dtype, "shapes": bucket.shapes})
            flat = bucket.flat if self._cuda else bucket.flat.cpu()
            _broadcast(self._group, flat, alive=self._alive)

    def end(self, *, complete: bool) -> None:
        """Say that this was the last bucket, or that no other will come."""
        with contextlib.suppress(RuntimeError):
            self._say({"end": complete})
        if not complete:
            _leave(self._group)

    def close(self) -> None:
        """End group and store: whoever still waits for a message hears that nobody is there."""
        _leave(self._group)
        self._group = self._store = None

    def _say(self, message: dict[str, Any]) -> None:
        self._store.set(f"bucket_{self._said}", json.dumps(message))
        self._said += 1

    def _arrivals(
        self, servers: Sequence[int], deadline: float, lost: Callable[[], set[int]]
    ) -> dict[int, tuple[int, bool]]:
        """(Number of workers, whether all are on CUDA) of each server whose workers all came."""
        here: dict[int, tuple[int, bool]] = {}
        while waiting := set(servers) - here.keys() - lost():
            for number in waiting:
                if (workers := self._workers_of(number)) is not None:
                    here[number] = workers
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return here

    def _workers_of(self, number: int) -> tuple[int, bool] | None:
        if not self._store.check([_worker_key(number, 0)]):
            return None
        count = json.loads(self._store.get(_worker_key(number, 0)))["count"]
        keys = [_worker_key(number, worker) for worker in range(count)]
        if not self._store.check(keys):
            return None
        return count, all(json.loads(self._store.get(key))["cuda"] for key in keys)


class Receiver:
    """One worker's side of a broadcast."""

    def __init__(self, offer: Offer, *, worker: int, workers: int, device: torch.device) -> None:
        """Not connected yet.

        Args:
            offer: what the server was told.
            worker: number of this worker in its engine.
            workers: how many the engine has.
            device: where the weights go.
        """
        self._offer = offer
        self._worker = worker
        self._workers = workers
        self._device = device
        self._store: Any = None
        self._members: dict[str, Any] = {}
        self._group: Any = None

    def join(self) -> bool:
        """Come to the meeting; whether this engine takes part. Nothing has changed if not."""
        offer = self._offer
        try:
            # A store that is gone, because we come late, would be tried again and again.
            socket.create_connection((offer.host, offer.port), _PATIENCE_SECONDS).close()
            store = dist.TCPStore(
                offer.host,
                offer.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=offer.join_seconds + _PATIENCE_SECONDS),
            )
            self._store = dist.PrefixStore(offer.key, store)
            about = {"count": self._workers, "cuda": self._device.type == "cuda"}
            self._store.set(_worker_key(offer.server, self._worker), json.dumps(about))
            self._members = json.loads(self._store.get("members"))
        except (RuntimeError, OSError) as error:
            print(f"{offer.weights}: no broadcast: {_first_line(error)}", flush=True)
            return False
        return str(offer.server) in self._members["ranks"]

    def tensors(
        self, versions: WeightVersions, expected: Mapping[str, Shape]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it arrives; where the broadcast breaks, the rest from the folder.

        Args:
            versions: the folder.
            expected: shape by name of everything that must come.

        Raises:
            InputError: tensors are missing, unknown or misshapen.
            TrainingError: the rest is not in the folder either.
        """
        name, seen = self._offer.weights, dict[str, Shape]()
        start = time.monotonic()
        try:
            for bucket in self._from_group():
                wanted = {key: expected[key] for key in bucket.shapes if key in expected}
                check_complete(wanted, bucket.shapes, name)
                seen |= bucket.shapes
                yield from bucket.tensors()
            print(f"{name}: received in {time.monotonic() - start:.2f} s", flush=True)
        except BroadcastBroken as error:
            print(f"{name}: {error}; the rest comes from the folder", flush=True)
            _leave(self._group)
            for key, tensor in self._from_folder(versions):
                if key not in seen:
                    seen[key] = tuple(tensor.shape)
                    yield key, tensor
        check_complete(expected, seen, name)

    def _from_group(self) -> Iterator[Bucket]:
        members = self._members
        rank = members["ranks"][str(self._offer.server)] + self._worker
        with _broken("the engines did not meet"):
            address = local_address(self._offer.host)
            self._group = _make_group(self._store, rank, members, address)
        device = self._device if members["cuda"] else torch.device("cpu")
        for count in itertools.count():
            with _broken("a bucket did not come"):
                message = json.loads(self._store.get(f"bucket_{count}"))
                if "end" in message:
                    break
                shapes = {key: tuple(shape) for key, shape in message["shapes"].items()}
                size = sum(map(math.prod, shapes.values()))
                # Not the last one's memory: vLLM keeps tensors until their layer is whole.
                flat = torch.empty(size, dtype=_dtype(message["dtype"]), device=device)
                _broadcast(self._group, flat, alive=self._trainer_lives)
            yield Bucket(flat, shapes)
        if not message["end"]:
            raise BroadcastBroken("the trainer gave up")

    def _from_folder(self, versions: WeightVersions) -> Iterator[tuple[str, Tensor]]:
        folder = self._wait_for(versions)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield key, file.get_tensor(key)

    def _wait_for(self, versions: WeightVersions) -> Path:
        """The complete folder; waited for as long as the trainer keeps the store open."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            try:
                return versions.find(self._offer.weights)
            except TrainingError:
                if time.monotonic() > deadline:
                    raise
            if self._trainer_lives():
                deadline = time.monotonic() + VISIBLE_SECONDS
            time.sleep(0.2)

    def _trainer_lives(self) -> bool:
        try:
            return bool(self._store.check(["members"]))
        except RuntimeError:
            return False


def buckets(
    tensors: Iterable[tuple[str, Tensor | None]], limit: int = BUCKET_BYTES
) -> Iterator[Bucket]:
    """Copies of tensors in buckets of up to ``limit`` bytes; a larger one has its own.

    Args:
        tensors: names and tensors; ``None`` is skipped.
        limit: bytes.
    """
    held: dict[str, Tensor] = {}
    size, dtype = 0, None
    for name, tensor in tensors:
        if tensor is None:
            continue
        if held and (size + tensor.nbytes > limit or tensor.dtype != dtype):
            yield _bucket(held)
            held, size = {}, 0
        held[name] = tensor.detach()
        size, dtype = size + tensor.nbytes, tensor.dtype
    if held:
        yield _bucket(held)


def local_address(host: str) -> str:
    """The address of this machine from which it reaches ``host``; nothing is sent.

    Raises:
        OSError: there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def _bucket(held: dict[str, Tensor]) -> Bucket:
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return Bucket(torch.cat([tensor.flatten() for tensor in held.values()]), shapes)


def _worker_key(server: int, worker: int) -> str:
    return f"server_{server}_worker_{worker}"


def _make_group(store: Any, rank: int, members: Mapping[str, Any], address: str) -> Any:
    """The process group of all members, beside whatever groups this process is in."""
    if members["cuda"]:
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(hours=1)
        # Its own watchdog would end this process where a member dies: _broadcast looks instead.
        with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
            return dist.ProcessGroupNCCL(store, rank, members["size"], nccl)
    backend: Any = dist.ProcessGroupGloo
    gloo = backend._Options()
    gloo._timeout = timedelta(seconds=_PATIENCE_SECONDS)
    gloo._devices = [backend.create_device(hostname=address)]
    gloo._threads = 1
    return backend(store, rank, members["size"], gloo)


def _broadcast(group: Any, flat: Tensor, *, alive: Callable[[], bool]) -> None:
    """From rank 0 to all; RuntimeError when it takes too long or the other side is gone."""
    seconds = _PATIENCE_SECONDS + flat.nbytes / _SLOWEST
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.timeout = timedelta(seconds=seconds)
    work = group.broadcast([flat.view(torch.uint8)], options)
    begun = looked = time.monotonic()
    while not work.is_completed():
        now = time.monotonic()
        if now - begun > seconds:
            raise RuntimeError(f"{flat.nbytes} bytes took more than {seconds:.0f} s")
        if now - looked > _LOOK_SECONDS:
            looked = now
            if not alive():
                raise RuntimeError("the other side is gone")
        time.sleep(_POLL_SECONDS)
    work.wait()


def _leave(group: Any) -> None:
    """End a group in which others may hang."""
    with contextlib.suppress(RuntimeError, AttributeError):
        group.abort()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


@contextlib.contextmanager
def _broken(what: str) -> Iterator[None]:
    """Whatever goes wrong on the way is one thing to the caller."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        raise BroadcastBroken(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
