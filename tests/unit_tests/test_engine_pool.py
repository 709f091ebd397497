"""Engines beside the trainer give their memory back whenever nobody samples."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.weights.interface import RepeatableExport

REQUESTS = [SampleRequest((1, 2), 4, seed) for seed in range(3)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, stop_token_ids=())


class RecordingEngine:
    """Writes down what is asked of it; awake after every use, as vLLM is, and empty after sleep."""

    forgets = True
    gpus = 1
    weight_bytes = 4

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.fails = fails
        self.has_weights = True
        self._asked: list[SampleRequest] = []

    def start_generate(self, requests: list[SampleRequest], sampling: Sampling) -> None:
        assert self.has_weights
        self.calls.append("wake cache, start")
        self._asked = list(requests)

    def finish_generate(self) -> list[Sample]:
        self.calls.append("finish")
        if self.fails:
            raise TrainingError("lost", kind="engine")
        return [Sample((request.seed,), (-1.0,), "stop") for request in self._asked]

    def generate(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        self.start_generate(requests, sampling)
        return self.finish_generate()

    def load_weights(self, folder: Path) -> None:
        found = [load_file(path)["a"].item() for path in folder.glob("*.safetensors")]
        self.calls.append(f"wake weights, load {found}")
        self.has_weights = True

    def sleep(self) -> None:
        if self.fails and self._asked:
            raise TrainingError("gone", kind="engine")
        self.calls.append("sleep")
        self.has_weights = False

    def close(self) -> None:
        pass


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _pool(engine: RecordingEngine) -> EnginePool:
    return EnginePool(rank=0, world_size=1, num_engines=1, make_engine=lambda _: engine)  # type: ignore[arg-type,return-value]


def _weights(value: int) -> RepeatableExport:
    return RepeatableExport(lambda: iter([("a", torch.tensor(float(value)))]))


@pytest.mark.usefixtures("one_rank")
def test_an_engine_sleeps_after_every_way_of_sampling_and_gets_weights_before_the_next() -> None:
    engine = RecordingEngine()
    with _pool(engine) as pool:
        with pool.awake():
            pass  # while the models are built
        pool.channel.send(_weights(0), version=0)
        pool.start(REQUESTS, SAMPLING)  # the rollout of a step
        assert [sample.token_ids for sample in pool.finish()] == [(0,), (1,), (2,)]
        pool.channel.send(_weights(1), version=1)
        pool.generate(REQUESTS, SAMPLING)  # an evaluation
        pool.start(REQUESTS, SAMPLING)  # the same weights again
        pool.channel.send(_weights(2), version=2)  # the samples are those of the weights before
        assert len(pool.finish()) == 3
    sampled = ["wake cache, start", "finish", "sleep"]
    loaded = [f"wake weights, load [{value}.0]" for value in range(3)]
    evaluated = [loaded[1], *sampled, loaded[1], *sampled]
    assert engine.calls == ["sleep", loaded[0], *sampled, *evaluated, loaded[2]]


@pytest.mark.usefixtures("one_rank")
def test_engines_stay_awake_within_a_block_and_sleep_however_it_is_left() -> None:
    engine = RecordingEngine()
    with _pool(engine) as pool:
        pool.channel.send(_weights(0), version=3)
        assert pool.channel.version == 3
        pool.start(REQUESTS, SAMPLING)
        with pool.awake():
            pool.finish()
            pool.generate(REQUESTS, SAMPLING)
        with pytest.raises(ZeroDivisionError), pool.awake():
            pool.generate(REQUESTS, SAMPLING)
            raise ZeroDivisionError
    loaded, sampled = "wake weights, load [0.0]", ["wake cache, start", "finish"]
    assert engine.calls == [loaded, *sampled, *sampled, "sleep", loaded, *sampled, "sleep"]


@pytest.mark.usefixtures("one_rank")
def test_an_engine_that_keeps_its_weights_is_given_them_once() -> None:
    engine = RecordingEngine()
    engine.forgets = False
    engine.sleep = lambda: None  # type: ignore[method-assign]  # as without CUDA
    with _pool(engine) as pool:
        pool.channel.send(iter([("a", torch.tensor(3.0))]), version=0)
        pool.generate(REQUESTS, SAMPLING)
        pool.generate(REQUESTS, SAMPLING)
    assert sum("load" in call for call in engine.calls) == 1


@pytest.mark.usefixtures("one_rank")
def test_weights_that_can_be_made_only_once_are_not_sampled_after_a_sleep() -> None:
    engine = RecordingEngine()
    with _pool(engine) as pool:
        pool.channel.send(iter([("a", torch.tensor(3.0))]), version=0)
        pool.generate(REQUESTS, SAMPLING)
        with pytest.raises(TrainingError, match="dropped their weights when they slept"):
            pool.generate(REQUESTS, SAMPLING)


@pytest.mark.usefixtures("one_rank")
def test_an_engine_that_fails_is_told_to_sleep_and_its_first_error_is_raised() -> None:
    engine = RecordingEngine(fails=True)
    with _pool(engine) as pool:
        pool.start(REQUESTS, SAMPLING)
        with pytest.raises(TrainingError, match="lost"):
            pool.finish()


class FakeChild:
    """Stands for the process of an engine and for both ends of its pipe."""

    pid = 2**30  # nobody's

    def __init__(self) -> None:
        self.sent: list[tuple[str, ...]] = []
        self.child = self.connection = self

    def send(self, message: tuple[str, ...]) -> None:
        self.sent.append(message)

    def recv(self) -> tuple[str, object]:
        return "ok", None

    def wait(self, seconds: float) -> int:
        return 0

    def close(self) -> None:
        pass

    def keep_output(self, log_file: Path) -> None:
        pass

    @property
    def commands(self) -> list[str]:
        """Commands with their part of the memory, in order, since the start."""
        return [
            " ".join(message[: 2 if message[0] == "wake" else 1])
            for message in self.sent
            if message[0] not in ("print_to", "start")
        ]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> FakeChild:
    """A machine with a GPU whose engine does whatever it is told."""
    child = FakeChild()
    monkeypatch.setattr("megatron_tropd.rollout.engines.process.take", lambda _: child)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return child


def test_memory_for_weights_wakes_to_load_them_and_the_cache_to_sample(
    child: FakeChild, tiny_llama: Path, tmp_path: Path
) -> None:
    with RolloutEngine(tiny_llama, max_model_len=16, log_file=tmp_path / "log") as engine:
        engine.generate(REQUESTS, SAMPLING)  # with the weights it started with
        engine.sleep()
        engine.sleep()
        assert not engine.has_weights
        with pytest.raises(TrainingError, match="was given none since"):
            engine.generate(REQUESTS, SAMPLING)
        engine.load_weights(tiny_llama)
        engine.generate(REQUESTS, SAMPLING)
        engine.load_weights(tiny_llama)  # awake: nothing to wake
        engine.generate(REQUESTS, SAMPLING)
        engine.sleep()
        engine.load_weights(tiny_llama)
        engine.sleep()  # half awake
        engine.load_weights(tiny_llama)
        engine.generate(REQUESTS, SAMPLING)
    assert child.commands == [
        *("generate", "sleep"),
        *("wake weights", "load_weights", "wake kv_cache", "generate"),
        *("load_weights", "generate", "sleep"),
        *("wake weights", "load_weights", "sleep"),
        *("wake weights", "load_weights", "wake kv_cache", "generate"),
    ]
    assert engine.weight_bytes == 4 * sum(
        t.numel() for t in load_file(tiny_llama / "model.safetensors").values()
    )
