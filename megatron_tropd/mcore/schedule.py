"""Micro-batches through a model by Megatron's pipeline schedules.

The output layer is never run: through ``output_processor`` the model gives the hidden states of
the positions that carry loss, and the loss gets them with the output layer's weight. T = loss
tokens of a micro-batch, v = this rank's vocabulary shard, H = hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface,
)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.mcore.hidden import SomeGradient, loss_token_states, output_weight, unwrap

LossFn = Callable[[Tensor, Tensor, MicroBatch, int], tuple[Tensor, dict[str, Tensor]]]
"""(hidden states [T, H], output weight [v, H], micro-batch, its index) -> (summed loss, sums to
report). The hidden states are whole on every tensor-parallel rank, and the gradient a rank gives
them is summed over those; the weight's may instead be added to its ``main_grad``."""


def gradients(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFn,
) -> list[dict[str, Tensor]]:
    """Gradients of sum(loss) / global number of loss tokens, into the main gradients.

    Args:
        chunks: the student's on this rank.
        micro_batches: of this data-parallel rank, the same list on all its stages.
        loss_fn: called at the last stage with the hidden states of the loss tokens.

    Returns:
        The reports of ``loss_fn`` (last stage; empty elsewhere).

    Collectives: those of Megatron's schedule and ``finalize_model_grads``.
    """
    return run_schedule(
        chunks,
        micro_batches,
        forward_step=partial(student_forward, loss_fn=loss_fn),
        forward_only=False,
    )


@torch.no_grad()
def hidden_states(chunks: Sequence[GPTModel], micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Hidden states of the loss tokens: a forward pass alone.

    Args:
        chunks: of this rank, not wrapped.
        micro_batches: of this data-parallel rank.

    Returns:
        [T, H] per micro-batch on the last stage, an empty list elsewhere.

    Collectives: forward only, those of the schedule; the hidden states of a sequence-parallel model
    are gathered over the tensor-parallel group.
    """
    for chunk in chunks:
        chunk.eval()
    with _nothing_offloaded(chunks[0].config):
        return run_schedule(chunks, micro_batches, forward_step=_forward_only, forward_only=True)


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    forward_step: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    """Send micro-batches of differing lengths through Megatron's pipeline schedule.

    Args:
        chunks: the (wrapped) model chunks of this stage; several if the pipeline is interleaved.
        micro_batches: at least one, equally many on every stage; of an interleaved pipeline a
            multiple of its stages.
        forward_step: Megatron's ``forward_step_func``.
        forward_only: no backward; ``forward_step``'s function then returns what to collect.

    Returns:
        What the loss function gave per micro-batch (last stage; empty elsewhere).
    """
    config = unwrap(chunks[0]).config
    iterators = [iter(enumerate(micro_batches)) for _ in chunks]
    one = len(chunks) == 1
    results = _schedule_of(config)(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if one else iterators,
        model=chunks[0] if one else list(chunks),
        num_microbatches=len(micro_batches),
        # Of whole rows. Our models ignore it: shapes travel (variable_seq_lengths).
        seq_length=micro_batches[0].tokens.shape[1] * config.context_parallel_size,
        micro_batch_size=micro_batches[0].tokens.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    for chunk in chunks:
        # What it received last, and the gradient of that, would stay until the next step.
        unwrap(chunk).set_input_tensor(None)
    return results


def _schedule_of(config: TransformerConfig) -> Callable[..., list[Any]]:
    """Choose Megatron's schedule by a model's own sizes: those of two models may differ."""
    if config.pipeline_model_parallel_size == 1:
        return schedules.forward_backward_no_pipelining
    if config.virtual_pipeline_model_parallel_size is None:
        return schedules.forward_backward_pipelining_without_interleaving
    return schedules.forward_backward_pipelining_with_interleaving


def turns(chunks: Sequence[GPTModel], num_micro_batches: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of each forward pass of a stage, in the schedule's order."""
    if len(chunks) == 1:
        return [(index, 0) for index in range(num_micro_batches)]
    group = chunks[0].config.microbatch_group_size_per_vp_stage
    return schedules.get_schedule_table(num_micro_batches, len(chunks), group)


def student_forward(
    iterator: Iterator[tuple[int, MicroBatch]], model: DistributedDataParallel, *, loss_fn: LossFn
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's ``forward_step_func`` of the student.

    Args:
        iterator: gives the micro-batches and their indices.
        model: the chunk whose turn it is, as Megatron wrapped it.
        loss_fn: the loss.

    Returns:
        (hidden states [T, H] of the last chunk on the last stage, the chunk's output elsewhere;
        Megatron's loss function of them: summed loss, number of loss tokens, report).
    """
    index, batch = next(iterator)

    def loss(hidden_TH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weight_vH = output_weight(unwrap(model))
        loss_sum, report = loss_fn(hidden_TH, weight_vH, batch, index)
        num_tokens = loss_sum.new_full((), len(batch.loss_at), dtype=torch.int)
        if model.ddp_config.overlap_grad_reduce and weight_vH.requires_grad:
            loss_sum = SomeGradient.apply(loss_sum, weight_vH)
        return loss_sum, num_tokens, report

    return loss_token_states(model, batch), loss


def _forward_only(
    iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    _, batch = next(iterator)
    return loss_token_states(model, batch), lambda hidden_TH, non_loss_data=True: hidden_TH


@contextmanager
def _nothing_offloaded(config: TransformerConfig) -> Iterator[None]:
    """Keep fine-grained offloading out of passes that save nothing for a backward pass.

    It learns from the first pass what the following ones will save.
    """
    if not config.fine_grained_activation_offloading:
        yield
        return
    FineGrainedActivationOffloadingInterface.disable_offload()
    config.fine_grained_activation_offloading = False
    try:
        yield
    finally:
        config.fine_grained_activation_offloading = True
        FineGrainedActivationOffloadingInterface.enable_offload()


def cross_entropy(
    hidden_TH: Tensor, weight_vH: Tensor, batch: MicroBatch, _: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token cross entropy of the loss tokens, a :data:`LossFn` for supervised training.

    Args:
        hidden_TH: [T, H] of the loss tokens.
        weight_vH: [v, H] this rank's shard of the output layer.
        batch: gives the labels.

    Returns:
        The sum over T and ``{"loss": sum, "tokens": T}``.

    Collectives: 3 all-reduces of [T] (Megatron's vocabulary-parallel cross entropy).
    """
    labels_T = batch.of_loss_tokens(batch.labels)
    logits_Tv = F.linear(hidden_TH, weight_vH)
    # Megatron overwrites fp32 logits; nobody reads these again.
    loss = vocab_parallel_cross_entropy(logits_Tv.float().unsqueeze(1), labels_T.unsqueeze(1)).sum()
    count = loss.new_full((), len(labels_T), dtype=torch.float32)
    return loss, {"loss": loss.detach(), "tokens": count}
