"""One optimizer step of the student, one scoring pass of the teacher: Megatron's schedules.

The output layer is never run: through ``output_processor`` the model gives the hidden states of
the positions that carry loss, and the loss gets them with the output layer's weight. T = loss
tokens of a micro-batch, v = this rank's vocabulary shard, H = hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface,
)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_tropd.config import MegatronConfig, ParallelConfig, TrainConfig
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.hidden import SomeGradient, loss_token_states, output_weight, unwrap
from megatron_tropd.mcore.options import with_options
from megatron_tropd.mcore.parallel import Ranks

__all__ = [
    "LossFn",
    "NotFinite",
    "StepResult",
    "Student",
    "Teacher",
    "Update",
    "cross_entropy",
    "hidden_states",
    "output_weight",
    "run_schedule",
    "student_forward",
]

LossFn = Callable[[Tensor, Tensor, MicroBatch, int], tuple[Tensor, dict[str, Tensor]]]
"""(hidden states [T, H], output weight [v, H], micro-batch, its index) -> (summed loss, sums to
report). The hidden states are whole on every tensor-parallel rank, and the gradient a rank gives
them is summed over those; the weight's may instead be added to its ``main_grad``."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves behind on this rank."""

    reports: list[dict[str, Tensor]]
    """One per micro-batch on the last stage, empty elsewhere."""
    grad_norm: float
    """Global norm before clipping, equal on all ranks."""
    lr: float
    """Learning rate this step used."""


class NotFinite(ArithmeticError):
    """The norm of the gradient is no number; no weight was changed."""

    def __init__(self, norm: float, names: Sequence[str]) -> None:
        """``names``: parameters of this rank whose gradient is not finite."""
        where = f", first in {', '.join(names[:3])} on this rank" if names else ""
        super().__init__(f"The gradient norm is {norm}{where}.")


class _TooLarge(ArithmeticError):
    """The norm of the gradient is above megatron.optimizer.grad_norm_skip_threshold."""

    def __init__(self, norm: float) -> None:
        super().__init__(norm)
        self.norm = norm


class Update(NamedTuple):
    """What became of an optimizer's step, equal on all ranks."""

    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of this step."""
    skipped: bool
    """Whether the norm was above megatron.optimizer.grad_norm_skip_threshold, and so weights and
    Adam's moments are as they were."""


def broken_gradients(model: torch.nn.Module) -> list[str]:
    """Names of the parameters whose summed gradient is not finite, on this rank."""
    gradients = {name: getattr(p, "main_grad", None) for name, p in model.named_parameters()}
    return [n for n, grad in gradients.items() if grad is not None and not grad.isfinite().all()]


class Student:
    """A trainable Megatron model with its DDP wrapper, optimizer and learning-rate schedule."""

    def __init__(
        self,
        model: GPTModel,
        *,
        train: TrainConfig,
        parallel: ParallelConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        megatron: MegatronConfig | None = None,
    ) -> None:
        """Wrap ``model`` for training. ``dtype`` bfloat16 keeps fp32 main weights and gradients.

        Args:
            model: not wrapped.
            train: the optimizer's settings.
            parallel: the layout.
            ranks: this rank's place.
            dtype: of the model.
            megatron: further options of Megatron's for optimizer and DDP.

        Raises:
            ConfigError: Megatron refuses the options.
        """
        megatron = megatron or MegatronConfig()
        self.model = model
        self.ranks = ranks
        self.chunk = _wrap(model, ddp_config(parallel, megatron), dtype)
        self.optimizer = get_megatron_optimizer(
            optimizer_config(train, parallel, dtype, megatron, model=model.config),
            [self.chunk],
            # Side groups for host tensors; without CUDA the groups are gloo already.
            use_gloo_process_groups=platform.has_cuda(),
        )
        self._look_at_norms()
        self.scheduler = _scheduler(self.optimizer, train)
        config = model.config
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.chunk.no_sync
        config.grad_scale_func = self.optimizer.scale_loss

    def _look_at_norms(self) -> None:
        """Have the optimizer stop between the gradient's norm and the first weight it changes."""
        norm_of = self.optimizer.get_grad_norm

        def good_norm() -> float:
            norm = norm_of()
            if norm is not None and not math.isfinite(norm):
                raise NotFinite(float(norm), broken_gradients(self.model))
            # Megatron would skip, too, but not on a rank that has no part of the states: the others
            # would wait for it in the next collective.
            if norm is not None and norm > self.optimizer.config.grad_norm_skip_threshold:
                raise _TooLarge(float(norm))
            return norm

        # Megatron's step asks for it once, before it clips.
        self.optimizer.get_grad_norm = good_norm

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn
    ) -> list[dict[str, Tensor]]:
        """Gradients of sum(loss) / global number of loss tokens, into the main gradients.

        Args:
            micro_batches: of this data-parallel rank, the same list on all its stages.
            loss_fn: called at the last stage with the hidden states of the loss tokens.

        Returns:
            The reports of ``loss_fn`` (last stage; empty elsewhere).

        Collectives: those of Megatron's schedule and ``finalize_model_grads``.
        """
        self.chunk.train()
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return run_schedule(
            self.chunk,
            micro_batches,
            forward_step=partial(student_forward, loss_fn=loss_fn),
            forward_only=False,
        )

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Hidden states of the loss tokens with the weights of now, no gradient, no dropout.

        Args:
            micro_batches: those of the step to come.

        Returns:
            [T, H] per micro-batch on the last stage, an empty list elsewhere.

        Collectives: those of :func:`hidden_states`.
        """
        return hidden_states(self.model, micro_batches)

    def update(self) -> Update:
        """Clip, step, advance the schedule.

        Raises:
            NotFinite: the gradient's norm is, on every rank; nothing was changed.
        """
        # train.lr's, not that of a group of parameters with another (decoupled_lr).
        lr, skipped = float(self.scheduler.get_lr({})), False
        try:
            _, grad_norm, _ = self.optimizer.step()
        except _TooLarge as error:
            grad_norm, skipped = error.norm, True
        # Copies of gradients in float32, if there are any: the engines need that memory now.
        self.optimizer.zero_grad()
        self._gather_parameters()
        # The rate belongs to the step's number, whatever becomes of the step.
        self.scheduler.step(increment=1)
        return Update(float(grad_norm or 0.0), lr, skipped)

    @torch.no_grad()
    def _gather_parameters(self) -> None:
        """Complete the weights, which hooks of the next forward pass would.

        They go to engines and checkpoints before that.
        """
        if self.chunk.ddp_config.overlap_param_gather:
            self.chunk.start_param_sync(force_sync=True)

    def train_step(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> StepResult:
        """:meth:`forward_backward` and :meth:`update` together."""
        reports = self.forward_backward(micro_batches, loss_fn)
        update = self.update()
        return StepResult(reports, update.grad_norm, update.lr)


class Teacher:
    """A frozen Megatron model on the student's ranks; gives hidden states, never logits."""

    def __init__(
        self,
        model: GPTModel,
        *,
        ranks: Ranks,
        vocab_size: int,
        weight_vH: Tensor | None = None,
    ) -> None:
        """Freeze ``model``.

        Args:
            model: not wrapped.
            ranks: this rank's place.
            vocab_size: columns that are real in both models.
            weight_vH: [v, H] output layer on the student's columns, where the model's own is
                sharded otherwise (last stage).
        """
        model.eval().requires_grad_(False)
        self.model = model
        self.ranks = ranks
        self.vocab_size = vocab_size
        self.weight_vH = weight_vH

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[HiddenStatesSignal]:
        """The teacher's signal for the loss tokens of each micro-batch.

        Args:
            micro_batches: the student's.

        Returns:
            One signal per micro-batch on the last stage, an empty list elsewhere.

        Collectives: those of :func:`hidden_states`.
        """
        hidden = hidden_states(self.model, micro_batches)
        if not self.ranks.is_last_stage:
            return []
        if self.weight_vH is None:
            self.weight_vH = output_weight(self.model)
        return [HiddenStatesSignal(h, self.weight_vH, self.vocab_size) for h in hidden]


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


@torch.no_grad()
def hidden_states(model: GPTModel, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Run a forward pass alone, without dropout; leaves the model in its mode for that.

    Args:
        model: not wrapped.
        micro_batches: of this data-parallel rank.

    Returns:
        [T, H] of the loss tokens of each micro-batch on the last stage, an empty list elsewhere.

    Collectives: forward only, those of the schedule; the hidden states of a sequence-parallel model
    are gathered over the tensor-parallel group.
    """
    model.eval()
    with _nothing_offloaded(model.config):
        return run_schedule(model, micro_batches, forward_step=_forward_only, forward_only=True)


def run_schedule(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    forward_step: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    """Send micro-batches of differing lengths through Megatron's pipeline schedule.

    Args:
        model: the (wrapped) model chunk of this stage.
        micro_batches: at least one; equally many on every stage.
        forward_step: Megatron's ``forward_step_func``.
        forward_only: no backward; ``forward_step``'s function then returns what to collect.

    Returns:
        What the loss function gave per micro-batch (last stage; empty elsewhere).
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(micro_batches)),
        model=model,
        num_microbatches=len(micro_batches),
        # Ignored: shapes travel with each micro-batch (variable_seq_lengths).
        seq_length=micro_batches[0].tokens.shape[1],
        micro_batch_size=micro_batches[0].tokens.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def student_forward(
    iterator: Iterator[tuple[int, MicroBatch]], model: DistributedDataParallel, *, loss_fn: LossFn
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's ``forward_step_func`` of the student.

    Args:
        iterator: gives the micro-batches and their indices.
        model: this stage's chunk, as Megatron wrapped it.
        loss_fn: the loss.

    Returns:
        (hidden states [T, H] on the last stage, the stage's output elsewhere; Megatron's loss
        function of them: summed loss, number of loss tokens, report).
    """
    index, batch = next(iterator)

    def loss(hidden_TH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weight_vH = output_weight(unwrap(model))
        loss_sum, report = loss_fn(hidden_TH, weight_vH, batch, index)
        num_tokens = loss_sum.new_full((), len(batch.loss_at), dtype=torch.int)
        if model.ddp_config.overlap_grad_reduce:
            loss_sum = SomeGradient.apply(loss_sum, weight_vH)
        return loss_sum, num_tokens, report

    return loss_token_states(model, batch), loss


def _forward_only(
    iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Tensor]]:
    _, batch = next(iterator)
    return loss_token_states(model, batch), lambda hidden_TH, non_loss_data=True: hidden_TH


def _wrap(
    model: GPTModel, ddp_config: DistributedDataParallelConfig, dtype: torch.dtype
) -> DistributedDataParallel:
    module = Float16Module(model.config, model) if dtype == torch.bfloat16 else model
    chunk = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=module)
    chunk.broadcast_params()
    return chunk


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


def ddp_config(parallel: ParallelConfig, megatron: MegatronConfig) -> DistributedDataParallelConfig:
    """Megatron's description of buckets and reduction; raises ConfigError if it refuses it."""
    own = dict(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
        average_in_collective=False,
    )
    return with_options(DistributedDataParallelConfig, own, megatron.ddp, table="ddp")


def optimizer_config(
    train: TrainConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    megatron: MegatronConfig,
    *,
    model: TransformerConfig,
) -> OptimizerConfig:
    """Megatron's description of the optimizer; raises ConfigError if it refuses it."""
    own = dict(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=bool(megatron.ddp.get("overlap_param_gather")),
        fp8_recipe=model.fp8_recipe if model.fp8 else None,
        pin_cpu_grads=platform.has_cuda(),
        pin_cpu_params=platform.has_cuda(),
    )
    return with_options(OptimizerConfig, own, megatron.optimizer, table="optimizer")


def _scheduler(optimizer: Any, train: TrainConfig) -> OptimizerParamScheduler:
    # Megatron's scheduler wants warm-up strictly shorter than the decay.
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=max(train.steps, train.warmup_steps + 1),
        lr_decay_style=train.lr_schedule,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
