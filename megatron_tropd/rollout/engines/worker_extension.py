"""What vLLM's workers can do here beside what vLLM lets them (``worker_extension_cls``)."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_tropd.rollout.engines.engine_model import first_rows


class WorkerExtension:
    """Methods that vLLM adds to its worker, called by name through ``collective_rpc``."""

    device: torch.device
    vllm_config: Any
    get_model: Callable[[], torch.nn.Module]
    reload_weights: Callable[..., None]

    def tropd_load_first_rows(self, folder: str, vocab_size: int) -> None:
        """Load a model with the first columns of its vocabulary only.

        Args:
            folder: HF folder.
            vocab_size: columns, those of this engine's model.
        """
        self.tropd_forget_packed_experts()
        self.reload_weights(weights_iterator=first_rows(folder, vocab_size))
        # It started with "dummy" weights, a format that vLLM does not load from a folder.
        self.vllm_config.load_config.load_format = "safetensors"

    def tropd_forget_packed_experts(self) -> None:
        """Let vLLM 0.32 pack the experts of new weights for its CPU kernels, as the first ones.

        With the kernel in place a reload keeps them as they are: wrong samples, no error.
        """
        if self.device.type != "cpu":
            return
        for module in self.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if hasattr(method, "moe_kernel"):
                method.moe_kernel = None
