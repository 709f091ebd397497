"""How weights get to the engines beside the trainer, without a GPU: a recorded protocol.

``device`` hand-overs run on the CPU, with a handle that stands for a CUDA one. What vLLM makes of
them is in test_vllm_on_cuda.py and, with a real engine, in tests/integration/test_rollout.py.
"""

import collections
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.rollout.engines import pool, transports
from megatron_tropd.rollout.engines.transports import DeviceTransport, Seat, device_groups
from megatron_tropd.rollout.weights.mailbox import roomy_root

CPU = torch.device("cpu")


class ReadingEngine:
    """Reads each buffer when it is told to, as a worker does, and writes down what came when."""

    def __init__(self, buffers: dict[str, Tensor], fails_at: int | None = None) -> None:
        self.buffers = buffers
        self.fails_at = fails_at
        self.calls: list[str] = []
        self.weights: dict[str, Tensor] = {}

    def begin_weights(self) -> None:
        self.calls.append("begin")

    def take_weights(self, update: dict[str, Any]) -> None:
        self.calls.append("take " + " ".join(update["names"]))
        if len(self.calls) == self.fails_at:
            raise TrainingError("the engine died", kind="engine")
        (handle,) = update["ipc_handles"].values()
        flat, start = self.buffers[handle[0]], 0
        for name, dtype, shape, size in zip(
            *(update[key] for key in ("names", "dtype_names", "shapes", "tensor_sizes")),
            strict=True,
        ):
            part = flat[start : start + size].clone().view(getattr(torch, dtype))
            self.weights[name] = part.view(shape)
            start += size

    def finish_weights(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def buffers() -> dict[str, Tensor]:
    """Exported buffers by their handle."""
    return {}


@pytest.fixture
def channel(buffers: dict[str, Tensor]) -> DeviceTransport:
    """To an engine on one GPU, 100 bytes at a time."""

    def export(tensor: Tensor) -> tuple[Any, ...]:
        handle = f"handle {len(buffers)}"
        buffers[handle] = tensor
        return (handle,)

    return DeviceTransport(
        {0: (0,)}, rank=0, uuid="GPU-0", device=CPU, export=export, bucket_bytes=100
    )


def _weights() -> dict[str, Tensor]:
    return {
        "a": torch.randn(2, 5),  # 40 bytes
        "b": torch.randn(10)[::2],
        "c": torch.randn(3, 3).bfloat16(),  # another type
        "large": torch.randn(100).bfloat16(),  # more than a buffer
        "d": torch.randn(3),
        "e": torch.tensor(1.5),
    }


def test_an_engine_reads_one_buffer_after_the_other(
    channel: DeviceTransport, buffers: dict[str, Tensor]
) -> None:
    weights, engine = _weights(), ReadingEngine(buffers)
    channel.send(iter(weights.items()), engine)  # type: ignore[arg-type]
    assert engine.calls == ["begin", "take a b", "take c", "take large", "take d e", "finish"]
    assert list(engine.weights) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(engine.weights[name], tensor), name
    assert [buffer.numel() for buffer in buffers.values()] == [100, 200]


def test_buffers_are_given_up_once_the_workers_on_every_gpu_have_let_go(
    channel: DeviceTransport, buffers: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ReadingEngine(buffers)
    monkeypatch.setattr(channel, "wait_for_each_other", lambda: engine.calls.append("wait"))
    channel.send(iter(_weights().items()), engine)  # type: ignore[arg-type]
    assert engine.calls[-2:] == ["finish", "wait"]


def test_after_a_failure_the_export_goes_on_for_the_other_ranks(
    channel: DeviceTransport, buffers: dict[str, Tensor]
) -> None:
    tensors, engine = iter(_weights().items()), ReadingEngine(buffers, fails_at=3)
    with pytest.raises(TrainingError, match="the engine died"):
        channel.send(tensors, engine)  # type: ignore[arg-type]
    assert next(tensors, None) is None, "making them is collective"
    assert engine.calls == ["begin", "take a b", "take c"]


def test_a_rank_without_an_engines_gpu_goes_along() -> None:
    channel = DeviceTransport({0: (0,)}, rank=1, uuid="GPU-1", device=CPU, export=lambda _: ())
    tensors: Iterator[tuple[str, None]] = iter([("a", None), ("b", None)])
    channel.send(tensors, None)
    assert next(tensors, None) is None


def _seats(hosts: str, engine_gpus: dict[int, int], gpus: int = 4) -> list[Seat]:
    places = {host: -1 for host in hosts}
    seats = []
    for rank, host in enumerate(hosts):
        places[host] += 1
        device = places[host] % gpus
        seats.append(Seat(host, device, f"GPU-{host}{device}", engine_gpus.get(rank, 0), True, 1))
    return seats


@pytest.mark.parametrize(
    ("seats", "expected"),
    [
        (_seats("a", {0: 1}), {0: (0,)}),
        (_seats("aaaabbbb", {0: 1, 4: 1}), {0: (0,), 4: (4,)}),
        (_seats("aaaabbbb", {0: 4, 4: 4}), {0: (0, 1, 2, 3), 4: (4, 5, 6, 7)}),
        (_seats("aa", {0: 4}), "GPU 2 of the engine of rank 0 on a is not that of rank 2"),
        (_seats("abab", {0: 2}), "GPU 1 of the engine of rank 0 on a is not that of rank 1"),
        (_seats("aaaa", {0: 2, 1: 2}), "engines share GPUs"),
        ([Seat("a", engine_gpus=1)], "no CUDA"),
    ],
)
def test_an_engine_reads_from_the_ranks_on_its_gpus(
    seats: list[Seat], expected: dict[int, tuple[int, ...]] | str
) -> None:
    assert device_groups(seats) == expected


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ("expandable_segments:True", "expandable_segments:False"),
        (
            "max_split_size_mb:512, expandable_segments: True",
            "max_split_size_mb:512,expandable_segments:False",
        ),
        ("max_split_size_mb:512", "max_split_size_mb:512"),
        ("", ""),
    ],
)
def test_a_shared_buffer_lies_in_no_expandable_segment(
    monkeypatch: pytest.MonkeyPatch, settings: str, inside: str
) -> None:
    now = [settings]
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: now[0])
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", lambda text: now.__setitem__(0, text)
    )
    with transports.fixed_segments():
        assert now == [inside]
    assert now[0].replace(" ", "") == settings.replace(" ", "")


def test_torch_has_the_settings_of_its_allocator() -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    with transports.fixed_segments():
        assert torch._C._accelerator_getAllocatorSettings() == before


Free = dict[Path, int]


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, int], Free]:
    """Sets the GiB that shared memory and the temporary folder have free."""
    usage = collections.namedtuple("usage", "total used free")
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    monkeypatch.setattr("megatron_tropd.rollout.weights.mailbox.SHARED_MEMORY", shared)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temporary))

    def set_free(of_shared: int, of_temporary: int) -> Free:
        free = {shared: of_shared * 2**30, temporary: of_temporary * 2**30}
        for folder in free:
            folder.mkdir(exist_ok=True)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free[Path(path)]))
        return free

    return set_free


def test_weights_take_the_first_place_with_room_for_all_engines_of_the_node(
    disks: Callable[[int, int], Free], capsys: pytest.CaptureFixture[str]
) -> None:
    shared, temporary = disks(64, 1000)
    assert roomy_root(8, 8 * 2**30) == shared
    assert not capsys.readouterr().out
    assert roomy_root(8, 9 * 2**30) == temporary
    assert f"through {temporary}: {shared} has 64.0 GiB free" in capsys.readouterr().out


def test_without_room_the_numbers_and_the_ways_out_are_named(
    disks: Callable[[int, int], Free],
) -> None:
    disks(0, 50)
    expected = (
        r"8 x 16\.0 GiB at a time, but .*shm has 0\.0 GiB free and .*tmp has 50\.0 GiB free\. .*"
        r"--shm-size=129g, or --ipc=host.*TMPDIR.*lower rollout\.num_engines"
    )
    with pytest.raises(ConfigError, match=expected):
        roomy_root(8, 16 * 2**30)


def test_on_gpus_a_pool_takes_the_device_and_elsewhere_the_folder(
    monkeypatch: pytest.MonkeyPatch,
    disks: Callable[[int, int], Free],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disks(1, 1)
    monkeypatch.setattr(pool, "run_everywhere", lambda action: [action()])
    gpu, cpu = _seats("a", {0: 1}), [Seat("a", engine_gpus=1, weight_bytes=8)]
    assert isinstance(pool._open_transport(gpu, 0, "auto"), DeviceTransport)
    assert not capsys.readouterr().out
    assert isinstance(pool._open_transport(cpu, 0, "auto"), transports.FolderTransport)
    assert not capsys.readouterr().out
    assert isinstance(pool._open_transport(gpu, 0, "folder"), transports.FolderTransport)
    assert "shared memory: rollout.weight_transport = folder" in capsys.readouterr().out


@pytest.mark.parametrize("hides", [True, False])
def test_the_time_of_the_default_group_or_a_long_one(monkeypatch, hides) -> None:
    wanted = timedelta(minutes=7)
    options = SimpleNamespace() if hides else SimpleNamespace(_timeout=wanted)
    world = SimpleNamespace(
        _device_types=["cpu"], _get_backend=lambda _: SimpleNamespace(options=options)
    )
    default = SimpleNamespace(group=SimpleNamespace(WORLD=world))
    monkeypatch.setattr(transports, "dist", default)
    assert transports._timeout() == (timedelta(days=1) if hides else wanted)
