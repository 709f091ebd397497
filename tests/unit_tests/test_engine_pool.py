"""Engines beside the trainer give their memory back whenever nobody samples."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_tropd.errors import TrainingError
from megatron_tropd.rollout.pool import EnginePool
from megatron_tropd.rollout.types import Sample, SampleRequest, Sampling

REQUESTS = [SampleRequest((1, 2), 4, seed) for seed in range(3)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, stop_token_ids=())


class RecordingEngine:
    """Writes down what is asked of it; awake after every use, as vLLM is."""

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.fails = fails
        self._asked: list[SampleRequest] = []

    def start_generate(self, requests: list[SampleRequest], sampling: Sampling) -> None:
        self.calls.append("wake, start")
        self._asked = list(requests)

    def finish_generate(self) -> list[Sample]:
        self.calls.append("finish")
        if self.fails:
            raise TrainingError("lost", kind="engine")
        return [Sample((request.seed,), (-1.0,), "stop") for request in self._asked]

    def generate(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        self.start_generate(requests, sampling)
        return self.finish_generate()

    def load_weights(self, folder: object) -> None:
        self.calls.append("wake, load")

    def sleep(self) -> None:
        self.calls.append("sleep")

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


@pytest.mark.usefixtures("one_rank")
def test_an_engine_sleeps_after_every_way_of_sampling() -> None:
    engine = RecordingEngine()
    with _pool(engine) as pool:
        pool.sleep()  # while the models are built
        pool.load_tensors(iter([]), version=0)
        pool.start_generate(REQUESTS, SAMPLING)  # the rollout of a step
        assert [sample.token_ids for sample in pool.finish_generate()] == [(0,), (1,), (2,)]
        pool.load_tensors(iter([]), version=1)
        pool.generate(REQUESTS, SAMPLING)  # an evaluation
        pool.start_generate(REQUESTS, SAMPLING)
        pool.load_tensors(iter([]), version=2)  # the samples are those of the weights before
        assert len(pool.finish_generate()) == 3
    sampled = ["wake, start", "finish", "sleep"]
    expected = ["sleep", "wake, load", *sampled, "wake, load", *sampled, *sampled, "wake, load"]
    assert engine.calls == expected


@pytest.mark.usefixtures("one_rank")
def test_an_engine_that_fails_is_asleep_too() -> None:
    engine = RecordingEngine(fails=True)
    with _pool(engine) as pool:
        pool.start_generate(REQUESTS, SAMPLING)
        with pytest.raises(TrainingError, match="lost"):
            pool.finish_generate()
    assert engine.calls[-1] == "sleep"
