"""Weights for an engine of two GPUs: both ranks there hand over the same buffers together."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks, run_with_env

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.rollout.engines.transports import DeviceTransport

GROUPS = {0: (0, 1)}


class RecordingEngine:
    """Of rank 0; looks at the handles of both GPUs."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.calls: list[Any] = []

    def begin_weights(self) -> None:
        self.calls.append("begin")

    def take_weights(self, update: dict[str, Any]) -> None:
        self.calls.append((update["names"], update["ipc_handles"]))
        if self.fails:
            raise TrainingError("the engine died", kind="engine")

    def finish_weights(self) -> None:
        self.calls.append("finish")


def hand_over(group: dist.ProcessGroup, fails: bool) -> None:
    """On each of three ranks, of which the last has no GPU of the engine."""
    rank = dist.get_rank()
    buffers: list[torch.Tensor] = []

    def export(buffer: torch.Tensor) -> tuple[Any, ...]:
        buffers.append(buffer)
        return rank, len(buffers)

    channel = DeviceTransport(
        GROUPS,
        rank=rank,
        uuid=f"GPU-{rank}",
        device=torch.device("cpu"),
        export=export,
        bucket_bytes=40,
    )
    assert channel.receivers == (0, 1)

    def tensors() -> Iterator[tuple[str, torch.Tensor | None]]:
        for number, size in enumerate((8, 8, 30)):  # two buffers, the second one larger
            dist.barrier()  # making them is collective
            yield f"w{number}", torch.full((size,), float(number)) if rank < 2 else None

    engine = RecordingEngine(fails=fails) if rank == 0 else None
    if fails and engine is not None:
        with pytest.raises(TrainingError, match="the engine died"):
            channel.send(tensors(), engine)  # type: ignore[arg-type]
    else:
        channel.send(tensors(), engine)  # type: ignore[arg-type]
    dist.barrier()
    if rank < 2:
        assert [buffer.tolist() for buffer in map(_floats, buffers)] == [
            [*(1.0,) * 8, *_floats(buffers[0])[8:].tolist()],
            [2.0] * 30,
        ]
    if engine is not None:
        both = [{f"GPU-{r}": (r, count) for r in (0, 1)} for count in (1, 2)]
        done = ["begin", (["w0"], both[0]), (["w1"], both[0]), (["w2"], both[1]), "finish"]
        assert engine.calls == (done[:2] if fails else done)


def _floats(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.view(torch.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_every_gpu_of_an_engine_has_its_buffer(fails: bool) -> None:
    """A failure of the engine leaves no rank waiting."""
    run_on_ranks(3, hand_over, fails)


def wait_as_long() -> None:
    dist.init_process_group("gloo", timeout=timedelta(hours=7))
    channel = DeviceTransport(
        GROUPS,
        rank=dist.get_rank(),
        uuid="",
        device=torch.device("cpu"),
        export=lambda buffer: (),
    )
    assert channel._group is not None
    gloo = channel._group._get_backend(torch.device("cpu"))
    assert gloo.options._timeout == timedelta(hours=7)


def test_no_group_gives_up_before_the_watchdog() -> None:
    """A group of torch's own time-out would, if the run's is a long one."""
    run_with_env(2, wait_as_long)
