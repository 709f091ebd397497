"""What vLLM's workers can do here beside what vLLM lets them (``worker_extension_cls``)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_tropd.data.samples import Blend
from megatron_tropd.rollout.engines.blended import BlendedSampler, Written
from megatron_tropd.rollout.engines.engine_model import all_tensors, first_rows


class WorkerExtension:
    """Methods that vLLM adds to its worker, called by name through ``collective_rpc``."""

    device: torch.device
    vllm_config: Any
    model_runner: Any
    get_model: Callable[[], torch.nn.Module]
    reload_weights: Callable[..., None]

    def tropd_load_first_rows(self, folder: str, vocab_size: int) -> None:
        """Load a model with the first columns of its vocabulary only.

        Args:
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
        if self.device.type == "cpu":
            _forget_packed_experts(self.get_model())

    def tropd_blend(self, folder: str | None, vocab_size: int) -> None:
        """Sample from between the model, a teacher, and its draft model, the student.

        Args:
            folder: HF folder of the student if the engine has its first columns only.
        """
        self._blended = BlendedSampler(self.model_runner)
        # Once: it is checked when it is made, against a folder that is gone after the start.
        self._draft_config = self.model_runner.drafter._create_draft_vllm_config()
        if folder is not None:
            self._reload_draft(first_rows(folder, vocab_size))

    def tropd_reload_draft(self, folder: str) -> None:
        """Replace the weights of the draft model by those of a folder of safetensors."""
        self._reload_draft(all_tensors(folder))

    def tropd_start_blending(self, rule: Blend, requests: Sequence[tuple[int, int]]) -> None:
        """As :meth:`BlendedSampler.start`."""
        self._blended.start(rule, requests)

    def tropd_finish_blending(self) -> list[list[Written]]:
        """As :meth:`BlendedSampler.finish`."""
        return self._blended.finish()

    def _reload_draft(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        # vLLM's worker reloads the target only; this is what it calls, for the draft model.
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        draft = self.model_runner.get_draft_model()
        if self.device.type == "cpu":
            _forget_packed_experts(draft)
        reload_weights(self._draft_config, draft, tensors, None, is_checkpoint_format=True)


def _forget_packed_experts(model: torch.nn.Module) -> None:
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None
