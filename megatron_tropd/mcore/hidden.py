"""The hidden states of a Megatron model in place of its logits: what the losses are made of.

T = loss tokens of a micro-batch, S = positions of a row, B = rows, v = this rank's vocabulary
shard, H = hidden size.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch

_TAKES_PROCESSOR = "output_processor" in inspect.signature(GPTModel.forward).parameters


def loss_token_states(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Run a (wrapped) model without its output layer.

    Args:
        model: this stage's chunk.
        batch: the micro-batch.

    Returns:
        [T, H] hidden states of the loss tokens on the last stage, whole on every tensor-parallel
        rank and in the order of ``loss_at``; the stage's output elsewhere. The gradients that the
        ranks give it are summed over them.

    Collectives: those of the model's forward; with sequence parallelism 1 all-gather.
    """
    gpt = unwrap(model)
    extra: dict[str, Any] = {}
    if isinstance(_inside_ddp(model), Float16Module):
        extra["fp32_output"] = False
    inputs = dict(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
    )
    if _TAKES_PROCESSOR:
        extra |= {"output_processor": _states_at, "output_processor_context": batch.loss_at}
        return model(**inputs, **extra)
    with _postprocessing(gpt, _states_at, batch.loss_at):
        return model(**inputs, **extra)


def output_weight(model: GPTModel) -> Tensor:
    """[v, H] this rank's shard of the output layer (the embedding's, when tied)."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and mixed-precision wrappers."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


class SomeGradient(torch.autograd.Function):
    """The loss as it is, and a gradient of zeros for the output weight.

    A loss that adds to ``main_grad`` leaves autograd nothing, and a DDP that overlaps its
    reduction takes a parameter without a gradient for a mistake.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight_vH: Tensor) -> Tensor:
        """Arguments: [] loss and [v, H] output weight."""
        ctx.save_for_backward(weight_vH)
        # No view: a pipeline's last stage frees the loss, and Megatron refuses to free views.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's gradient, and zeros."""
        return grads[0], torch.zeros_like(*ctx.saved_tensors)


def _inside_ddp(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _states_at(
    *, hidden_states: Tensor, output_layer: torch.nn.Module, context: Tensor, config: Any, **_: Any
) -> Tensor:
    """[S(/tp), B, H] -> [T, H] in the order of ``loss_at``; gradients of shards are summed."""
    # A DDP that overlaps its parameter all-gather waits for it in hooks of the layers' calls.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    if config.sequence_parallel:
        whole = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
        return _rows_at(whole, context)
    # Rows first: before 0.19 the sum of a gradient that is not contiguous gets lost in Megatron.
    return copy_to_tensor_model_parallel_region(_rows_at(hidden_states, context))


def _rows_at(hidden_SBH: Tensor, at_T: Tensor) -> Tensor:
    length, rows, _ = hidden_SBH.shape
    at_T = at_T % length * rows + at_T // length
    return _PickRows.apply(hidden_SBH.flatten(0, 1), at_T)


class _PickRows(torch.autograd.Function):
    """Some rows of a tensor, none twice: the gradient is copied, where torch's own would add."""

    @staticmethod
    def forward(ctx: Any, all_NH: Tensor, at_T: Tensor) -> Tensor:
        ctx.save_for_backward(at_T)
        ctx.num = len(all_NH)
        return all_NH.index_select(0, at_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (at_T,) = ctx.saved_tensors
        grad_NH = grads[0].new_zeros(ctx.num, grads[0].shape[1])
        return grad_NH.index_copy_(0, at_T, grads[0]), None


@contextmanager
def _postprocessing(gpt: GPTModel, processor: Callable[..., Tensor], context: Any) -> Iterator[Any]:
    """``output_processor`` for Megatron-Core before 0.18, which lacks it."""

    def postprocess(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not gpt.post_process:
            return hidden_states
        return processor(
            hidden_states=hidden_states,
            output_layer=gpt.output_layer,
            context=context,
            config=gpt.config,
        )

    gpt._postprocess = postprocess
    try:
        yield
    finally:
        del gpt._postprocess
