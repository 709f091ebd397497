"""How often the host of a GPU would wait for it in a step: by the calls that a CPU's run makes."""

import json
import os
from pathlib import Path

import pytest

from megatron_tropd.config import ParallelConfig, TrainConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.packing import count_loss_tokens
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

METHODS = {"tropd": preset("tropd"), "exact": preset("tropd_exact"), "top_d": preset("top_d")}
ROWS_OF_CHUNK = 16


def count_all(student: str, teacher: str, out: str) -> None:
    """Calls of a step by method and number of micro-batches."""
    import torch.distributed as dist

    from megatron_tropd.losses import chunks, tensors
    from megatron_tropd.mcore import platform

    os.environ["TROPD_PLAIN"] = "1"  # the passes that a GPU without Triton takes
    tensors.can_be_asked = lambda _: False
    chunks._chunk_rows = lambda *_: ROWS_OF_CHUNK
    dist.init_process_group(platform.distributed_backend())
    found = {}
    for method in METHODS:
        for micro_batches in (2, 4):
            found[f"{method} {micro_batches}"] = _count(student, teacher, method, micro_batches)
            leave_layout()
    Path(out).write_text(json.dumps(found))


def _count(student: str, teacher: str, method: str, count: int) -> dict[str, int]:
    from megatron_tropd.distill.step import forward_backward, micro_batches
    from megatron_tropd.distill.step_records import StepRecords
    from tests.host_syncs import host_syncs

    train, loss = TrainConfig(steps=3, tokens_per_micro_batch=48), METHODS[method]
    parts = build_parts(student, teacher, ParallelConfig(), train, loss, pad_multiple=48)
    trajectories = recorded_trajectories(0, count=count)
    batches = micro_batches(parts, trajectories, 0)
    assert len(batches) == count
    counts, prompts = count_loss_tokens(trajectories, loss), [t.key.prompt for t in trajectories]
    with host_syncs() as found:
        records = StepRecords(parts.device, counted=True)
        forward_backward(parts, batches, counts, 0, record=records, prompts=prompts)
        totals = records.sums.reduce()
        assert totals.first_bad_token is None
        totals.metrics()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model) -> dict[str, dict[str, int]]:
    out = tmp_path_factory.mktemp("syncs") / "found.json"
    pair = tiny_model("llama", tie_word_embeddings=True), tiny_model("qwen3", seed=5)
    run_with_env(1, count_all, *map(str, pair), str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_host_waits_for_no_micro_batch(method, found):
    few, many = found[f"{method} 2"], found[f"{method} 4"]
    more = {call: many[call] - few.get(call, 0) for call in many if many[call] > few.get(call, 0)}
    assert not more, f"{sum(more.values()) / 2:g} times for each: {json.dumps(more, indent=1)}"


@pytest.mark.parametrize("method", METHODS)
def test_host_waits_once_a_step_for_the_numbers_of_all(method, found):
    """Sums and the key of a bad token: the second is there when the first is."""
    calls = found[f"{method} 2"]
    assert sum(calls.values()) == 2, json.dumps(calls, indent=1)
    assert all("distill/metrics.py" in call for call in calls)
