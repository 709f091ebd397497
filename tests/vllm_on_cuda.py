"""What the installed vLLM makes of our settings on an H100, found out without one.

``python tests/vllm_on_cuda.py MODEL_FOLDER`` prints JSON. A process of its own, since the platform
is faked for all of vLLM: its CUDA platform, with answers in place of the questions to a device.
"""

import inspect
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from megatron_tropd.rollout.engines.process import engine_environment  # noqa: E402

environment = engine_environment(os.environ, threads=1, cuda_devices="")
os.environ.clear()
os.environ.update(environment)

import torch  # noqa: E402

COMPILED = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C")
for name in COMPILED:  # kernels of the CUDA build
    sys.modules[f"vllm.{name}"] = types.ModuleType(name)

import vllm.platforms as platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class H100(CudaPlatformBase):
    """vLLM's CUDA platform with a device that answers."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 * 2**30

    @classmethod
    def is_fully_connected(cls, device_ids: list[int]) -> bool:
        return True

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    @classmethod
    def device_count(cls) -> int:
        return 8

    def is_cumem_allocator_available(self) -> bool:
        return True


platforms._current_platform = H100()
platforms.vllm_version_matches_substr = lambda _: False  # Triton is for CUDA here

from vllm import _custom_ops  # noqa: E402

for name in dir(_custom_ops):
    if "_supports_" in name:  # asked of the kernels of the CUDA build
        setattr(_custom_ops, name, lambda *_: False)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.usage.usage_lib import UsageContext  # noqa: E402
from vllm.v1.executor.abstract import SLEEP_TAGS  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402

from megatron_tropd.data.samples import SampleRequest, Sampling  # noqa: E402
from megatron_tropd.rollout.engines import child  # noqa: E402
from megatron_tropd.rollout.engines.settings import EngineSettings  # noqa: E402
from megatron_tropd.rollout.engines.transports import DeviceTransport  # noqa: E402
from megatron_tropd.rollout.engines.worker_extension import WorkerExtension  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "one GPU": {"tensor_parallel": 1},
    "four GPUs": {"tensor_parallel": 4},
    "limits": {"tensor_parallel": 1, "max_num_seqs": 64, "max_num_batched_tokens": 2048},
    "fewer columns": {"tensor_parallel": 1, "cut_from": "/elsewhere", "vocab_size": 100},
}


def engine_config(folder: str, **settings: Any) -> Any:
    """What ``vllm.LLM`` would run with."""
    asked = EngineSettings(
        model_folder=folder,
        dtype="bfloat16",
        max_model_len=256,
        gpu_share=0.4,
        cpu_kv_gib=1.0,
        prefix_caching=True,
        cuda=True,
        **{"max_num_seqs": None, **settings},
    )
    return EngineArgs(**child.engine_arguments(asked)).create_engine_config(UsageContext.LLM_CLASS)


def facts(config: Any) -> dict[str, Any]:
    """What of a config our code relies on, or must know."""
    model, scheduler, parallel = (
        config.model_config,
        config.scheduler_config,
        config.parallel_config,
    )
    return {
        "v2_runner": config.use_v2_model_runner,
        "async_scheduling": scheduler.async_scheduling,
        "chunked_prefill": scheduler.enable_chunked_prefill,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "memory": config.cache_config.gpu_memory_utilization,
        "worker": parallel.worker_cls,
        "executor": parallel.distributed_executor_backend,
        "tensor_parallel": parallel.tensor_parallel_size,
        "extension": parallel.worker_extension_cls,
        "sleep_mode": [model.enable_sleep_mode, model.sleep_mode_backend],
        "cumem": model.enable_cumem_allocator,
        "logprobs_mode": model.logprobs_mode,
        "seed": model.seed,
        "tokenizer": not model.skip_tokenizer_init,
        "dtype": str(model.dtype),
        "load_format": config.load_config.load_format,
        "weight_transfer": config.weight_transfer_config.backend,
        "compilation": config.compilation_config.mode.name,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "most_in_a_graph": config.compilation_config.max_cudagraph_capture_size,
    }


def sampling(config: Any) -> dict[str, Any]:
    """Our sampling parameters, which vLLM has accepted for this model."""
    params: SamplingParams = child._sampling_params(
        SampleRequest((1, 2), 8, 2**62), Sampling(stop_token_ids=(3,))
    )
    params.verify(config.model_config, None, config.structured_outputs_config, None)
    names = ("seed", "logprobs", "min_tokens", "logit_bias", "bad_words", "logprob_token_ids")
    names += ("presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs")
    return {name: getattr(params, name) for name in names}


class Model:
    """Remembers the weights that it was given, buffer by buffer."""

    def __init__(self) -> None:
        self.loaded: list[list[tuple[str, torch.Tensor]]] = []

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded.append(weights)


class Engine:
    """vLLM's own receiver behind the calls that our channel makes."""

    def __init__(self, config: Any, model: Model) -> None:
        device = torch.device("cuda", 3)
        self.transfer = IPCWeightTransferEngine(
            config.weight_transfer_config, config, device, model
        )  # type: ignore[arg-type]

    def begin_weights(self) -> None:
        self.transfer.init_transfer_engine(self.transfer.parse_init_info({"packed": True}))

    def take_weights(self, update: dict[str, Any]) -> None:
        self.transfer.receive_weights(self.transfer.parse_update_info(update))

    def finish_weights(self) -> None:
        self.transfer._packed_importer.close()


def transferred(config: Any) -> dict[str, Any]:
    """Whether vLLM's receiver reads what our channel sends, on a device with number 3 of its own.

    Only the opening of the handle is ours: it gives the buffer instead of mapping it.
    """
    buffers: list[torch.Tensor] = []

    def export(buffer: torch.Tensor) -> tuple[Any, ...]:
        buffers.append(buffer)
        # As torch's reduce_tensor has it: the device's number here is the seventh.
        return (*range(6), 0, len(buffers) - 1, *range(7))

    def rebuild(*arguments: Any) -> torch.Tensor:
        assert arguments[6] == 3 and len(arguments) == 15
        return buffers[arguments[7]]

    torch.multiprocessing.reductions.rebuild_cuda_tensor = rebuild
    torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(uuid="GPU-3")  # type: ignore
    weights = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2),
        "large": torch.randn(99),
    }
    model = Model()
    channel = DeviceTransport(
        {0: (0,)}, rank=0, uuid="GPU-3", device=torch.device("cpu"), export=export, bucket_bytes=50
    )
    channel.send(iter(weights.items()), Engine(config, model))  # type: ignore[arg-type]
    loaded = [pair for buffer in model.loaded for pair in buffer]
    assert [name for name, _ in loaded] == list(weights)
    return {
        "buffers": len(model.loaded),
        "equal": all(torch.equal(tensor, weights[name]) for name, tensor in loaded),
    }


def parameters(function: Any) -> list[str]:
    """Names of what it takes."""
    return list(inspect.signature(function).parameters)


def main(folder: str) -> None:
    """Print everything."""
    configs = {name: engine_config(folder, **settings) for name, settings in SETTINGS.items()}
    one = configs["one GPU"]
    worker_calls = ("sleep", "wake_up", "reload_weights", "update_weights", "finish_weight_update")
    worker_calls += ("init_weight_transfer_engine", "start_weight_update", "get_model")
    llm_calls = ("sleep", "wake_up", "reset_prefix_cache", "collective_rpc", "update_weights")
    llm_calls += ("init_weight_transfer_engine", "start_weight_update", "finish_weight_update")
    print(
        json.dumps(
            {
                "configs": {name: facts(config) for name, config in configs.items()},
                "sampling": sampling(one),
                "transferred": transferred(one),
                "sleep_tags": sorted(SLEEP_TAGS),
                "worker": {name: parameters(getattr(Worker, name)) for name in worker_calls},
                "llm": {name: parameters(getattr(LLM, name)) for name in llm_calls},
                "runner_reload": parameters(GPUModelRunner.reload_weights),
                "in_the_way": [
                    n for n in vars(WorkerExtension) if hasattr(Worker, n) and n[0] != "_"
                ],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
