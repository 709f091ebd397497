"""An engine beside the trainer on one GPU: memory given back asleep, weights from GPU to GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tropd.data.samples import SampleRequest, Sampling
from megatron_tropd.rollout.engines.device_memory import free_bytes, wait_for_memory
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.transports import DeviceTransport, export_by_ipc, this_seat

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

REQUESTS = [SampleRequest((3, 5, 7 + i), 24, 10**12 + i) for i in range(8)]
MEMORY = 0.2


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    """A small Qwen2: biases and a tied output layer."""
    return tiny_model("qwen2", head_dim=64, hidden_size=256)


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    settings = {"max_model_len": 64, "dtype": "bfloat16", "gpu_share": MEMORY}
    with RolloutEngine(folder, log_file=log, **settings) as engine:
        engine.wait_ready()
        yield engine


def tokens(engine: RolloutEngine) -> list[tuple[int, ...]]:
    """What it samples now."""
    return [sample.token_ids for sample in engine.generate(REQUESTS, Sampling())]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """On the GPU, with an explicit output layer, as the trainer exports them."""
    weights = {n: t.cuda().bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights


def channel(engine: RolloutEngine) -> DeviceTransport:
    seat = this_seat(engine, "here")
    assert seat.device is not None
    device = torch.device("cuda", seat.device)
    return DeviceTransport({0: (0,)}, rank=0, uuid=seat.uuid, device=device, export=export_by_ipc)


def test_weights_go_from_gpu_to_gpu_and_sleep_gives_the_memory_back(
    engine: RolloutEngine, folder: Path, tmp_path: Path
) -> None:
    first = tokens(engine)
    awake = free_bytes()
    engine.sleep()
    asleep = free_bytes()
    assert awake is not None and asleep is not None
    total = torch.cuda.mem_get_info()[1]
    assert asleep - awake > 0.5 * MEMORY * total
    way, old = channel(engine), weights_of(folder)
    new = {name: tensor * 0.9 for name, tensor in old.items()}
    way.send(iter(old.items()), engine)
    assert tokens(engine) == first
    engine.sleep()
    way.send(iter(new.items()), engine)
    through_gpu = tokens(engine)
    assert through_gpu != first
    copies = {name: tensor.cpu().contiguous() for name, tensor in new.items()}
    save_file(copies, tmp_path / "model.safetensors")
    engine.load_weights(tmp_path)
    assert tokens(engine) == through_gpu


def test_the_memory_of_a_closed_engine_comes_back(folder: Path, tmp_path: Path) -> None:
    before = free_bytes()
    settings = {"max_model_len": 64, "dtype": "bfloat16", "gpu_share": MEMORY}
    with RolloutEngine(folder, log_file=tmp_path / "log", **settings) as engine:
        engine.generate(REQUESTS[:1], Sampling())
    wait_for_memory(before, "the engine")
