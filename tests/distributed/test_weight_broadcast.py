"""Weights that go round directly, between real processes; no engine.

With engines and servers: tests/integration/test_served_rollouts.py.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import PRELOADED

from megatron_tropd.base.errors import InputError
from megatron_tropd.rollout.engines.wire import Offer
from megatron_tropd.rollout.weights.broadcast import BroadcastBroken, Receiver, Sender, buckets
from megatron_tropd.rollout.weights.weight_sync import WeightsName, WeightVersions

NAME = WeightsName(7, "me")
SHAPES = {f"layer.{i}": (64, 16 + i) for i in range(6)} | {"norm": (3,), "scale": ()}
BYTES = 12_000
"""Of a bucket: about two of the layers."""


def weights() -> dict[str, torch.Tensor]:
    """The tensors that are sent, of two dtypes, one of them not contiguous."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["layer.1"] = tensors["layer.1"].t().contiguous().t()
    tensors["norm"] = tensors["norm"].bfloat16()
    return tensors


def receive(offer: Offer, folder: Path, dies_after: str) -> None:
    """Take the weights and keep them; die as soon as ``dies_after`` is there."""
    torch.set_num_threads(1)
    receiver = Receiver(offer, worker=0, workers=1, device=torch.device("cpu"))
    assert receiver.join()
    taken = {}
    for name, tensor in receiver.tensors(WeightVersions(folder / "weights"), SHAPES):
        taken[name] = tensor
        if name == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save(taken, folder / f"taken_{offer.server}")


@pytest.fixture
def sender() -> Iterator[Sender]:
    """On loopback."""
    sender = Sender("127.0.0.1")
    yield sender
    sender.close()


def start(
    sender: Sender, folder: Path, dies_after: dict[int, str]
) -> list[multiprocessing.Process]:
    """A receiver for each server of ``dies_after``."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=receive, args=(sender.offer(NAME, server, 30.0), folder, name))
        for server, name in dies_after.items()
    ]
    for process in processes:
        process.start()
    return processes  # type: ignore[return-value]


def check_taken(folder: Path, server: int) -> None:
    """Every bit is there."""
    taken = torch.load(folder / f"taken_{server}")
    assert taken.keys() == SHAPES.keys()
    for name, tensor in weights().items():
        assert taken[name].dtype == tensor.dtype and torch.equal(taken[name], tensor)


def test_buckets_hold_copies_of_one_dtype_up_to_their_size() -> None:
    tensors = weights()
    made = list(buckets([("absent", None), *tensors.items()], BYTES))
    assert [list(bucket.shapes) for bucket in made] == [
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4", "layer.5"],
        ["norm"],
        ["scale"],
    ]
    tensors["layer.0"].zero_()
    for name, tensor in (pair for bucket in made for pair in bucket.tensors()):
        assert torch.equal(tensor, weights()[name])


def test_everybody_gets_every_bit_and_who_is_lost_is_not_waited_for(
    sender: Sender, tmp_path: Path
) -> None:
    processes = start(sender, tmp_path, {0: "", 2: ""})
    start_time = time.monotonic()
    sender.gather([0, 1, 2], seconds=500.0, cuda=False, lost=lambda: {1})
    assert sender.members == [0, 2] and time.monotonic() - start_time < 400
    for bucket in buckets(weights().items(), BYTES):
        sender.send(bucket)
    sender.end(complete=True)
    for process in processes:
        process.join(500)
    for server in (0, 2):
        check_taken(tmp_path, server)
    assert not (tmp_path / "weights").exists()


def test_when_one_is_killed_in_the_middle_the_others_take_the_rest_from_the_folder(
    sender: Sender, tmp_path: Path
) -> None:
    processes = start(sender, tmp_path, {0: "", 1: "layer.2", 2: ""})
    sender.gather([0, 1, 2], seconds=500.0, cuda=False)
    assert sender.members == [0, 1, 2]
    stream = buckets(weights().items(), BYTES)
    sender.send(next(stream))
    sender.send(next(stream))
    processes[1].join(500)
    assert processes[1].exitcode == -signal.SIGKILL
    before = time.monotonic()
    with pytest.raises(BroadcastBroken, match="a bucket was not sent"):
        for bucket in stream:
            sender.send(bucket)
    sender.end(complete=False)
    assert time.monotonic() - before < 25, "a closed connection is noticed at once"
    time.sleep(0.5)
    assert not (tmp_path / "taken_0").exists(), "the folder is waited for"
    WeightVersions(tmp_path / "weights").write(NAME, iter(weights().items()))
    for server in (0, 2):
        processes[server].join(500)
        check_taken(tmp_path, server)


def test_who_comes_late_has_what_it_had(sender: Sender) -> None:
    offer = sender.offer(NAME, 0, 1.0)
    sender.gather([0], seconds=0.0, cuda=False)
    assert sender.members == []
    assert not Receiver(offer, worker=0, workers=1, device=torch.device("cpu")).join()
    sender.close()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = Offer("x", NAME, *closed.getsockname(), "key", 0, 1.0)
    assert not Receiver(gone, worker=0, workers=1, device=torch.device("cpu")).join()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (SHAPES | {"lm_head": (2, 2)}, r"missing 1 \(lm_head\)"),
        ({name: SHAPES[name] for name in SHAPES if name != "norm"}, r"unknown 1 \(norm\)"),
        (SHAPES | {"norm": (4,)}, r"norm is \[3\], expected \[4\]"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tmp_path: Path, expected: dict[str, tuple[int, ...]], message: str
) -> None:
    receiver = Receiver(
        Offer("x", NAME, "127.0.0.1", 1, "key", 0, 1.0),
        worker=0,
        workers=1,
        device=torch.device("cpu"),
    )
    receiver._from_group = lambda: buckets(weights().items(), BYTES)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=message):
        dict(receiver.tensors(WeightVersions(tmp_path), expected))
