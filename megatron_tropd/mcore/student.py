"""The model that is trained: its weights by what is done with them, its optimizer's steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import Parameter

from megatron_tropd.config import MegatronConfig, ParallelConfig, TrainConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.mcore import platform, schedule
from megatron_tropd.mcore.average import Average
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.options import ddp_config, optimizer_config
from megatron_tropd.mcore.schedule import LossFn
from megatron_tropd.mcore.waiting import GradientWait


class StudentModel(Protocol):
    """A model by its weights: those that are run, trained, saved and given away.

    They are the same for a model that is trained as a whole, and differ for adapters.
    """

    @property
    def chunks(self) -> Sequence[GPTModel]:
        """What is run: this rank's part, not wrapped; in one piece unless the pipeline is
        interleaved.
        """

    @property
    def module(self) -> GPTModel:
        """The last chunk, which has the output layer on the last stage."""

    @property
    def layout(self) -> Layout:
        """This rank's place."""

    def load(self, source: HFFolder | MegatronFolder) -> None:
        """Fill the chunks before training; collective."""

    def trainable(self) -> Mapping[str, Parameter]:
        """Find the parameters that are trained, reduced and saved, by their names."""

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe what a checkpoint holds of them, as Megatron's sharded state dictionary.

        Args:
            metadata: Megatron's.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` described, loaded."""

    def exported(
        self,
        receivers: Sequence[int] = (0,),
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype | None = None,
        explicit_lm_head: bool = False,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Walk the trained model as HF tensors; every rank must exhaust the iterator.

        Args:
            receivers: global ranks that get the tensors; the others get None.
            vocab_size: rows of embedding and output layer; None: as many as the folder had.
            dtype: of the tensors; None: the parameters'.
            explicit_lm_head: also yield ``lm_head.weight`` of a tied model.
        """


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


def broken_gradients(parameters: Mapping[str, Parameter]) -> list[str]:
    """Names of the parameters whose summed gradient is not finite, on this rank."""
    gradients = {name: getattr(p, "main_grad", None) for name, p in parameters.items()}
    return [n for n, grad in gradients.items() if grad is not None and not grad.isfinite().all()]


class Student:
    """A trainable Megatron model with its DDP wrapper, optimizer and learning-rate schedule."""

    def __init__(
        self,
        model: StudentModel,
        *,
        train: TrainConfig,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        megatron: MegatronConfig | None = None,
    ) -> None:
        """Wrap a model for training. ``dtype`` bfloat16 keeps fp32 main weights and gradients.

        Args:
            model: whose weights are trained.
            train: the optimizer's settings.
            parallel: the layout.
            dtype: of the model.
            megatron: further options of Megatron's for optimizer and DDP.

        Raises:
            ConfigError: Megatron refuses the options.
        """
        megatron = megatron or MegatronConfig()
        self.model = model
        for chunk in model.chunks:
            chunk.requires_grad_(False)
        for parameter in model.trainable().values():
            parameter.requires_grad_(True)
        ddp, config = ddp_config(parallel, megatron), model.module.config
        self.chunks = [
            # The gradients of all chunks but the first travel beside products in any case.
            _wrap(chunk, ddp, dtype, in_buckets=number == 0)
            for number, chunk in enumerate(model.chunks)
        ]
        self.optimizer = get_megatron_optimizer(
            optimizer_config(train, parallel, dtype, megatron, model=config),
            self.chunks,
            # Side groups for host tensors; without CUDA the groups are gloo already.
            use_gloo_process_groups=platform.has_cuda(),
        )
        self._look_at_norms()
        self.scheduler = _scheduler(self.optimizer, train)
        self.average: Average | None = None
        """Of the weights, over the steps: checkpoints hold it, too. None: nobody keeps one."""
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = finalize_model_grads
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        config.grad_scale_func = self.optimizer.scale_loss
        config.timers = self.wait = GradientWait()

    @property
    def module(self) -> GPTModel:
        """The last chunk of what is run, not wrapped."""
        return self.model.module

    def _look_at_norms(self) -> None:
        """Have the optimizer stop between the gradient's norm and the first weight it changes."""
        norm_of = self.optimizer.get_grad_norm

        def good_norm() -> float:
            norm = norm_of()
            if norm is not None and not math.isfinite(norm):
                raise NotFinite(float(norm), broken_gradients(self.model.trainable()))
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
        """Zero the gradients and run :func:`~megatron_tropd.mcore.schedule.gradients`."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return schedule.gradients(self.chunks, micro_batches, loss_fn)

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Hidden states of the loss tokens with the weights of now, no gradient, no dropout.

        As :func:`~megatron_tropd.mcore.schedule.hidden_states`.
        """
        return schedule.hidden_states(self.model.chunks, micro_batches)

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
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def _wrap(
    model: GPTModel,
    ddp_config: DistributedDataParallelConfig,
    dtype: torch.dtype,
    *,
    in_buckets: bool,
) -> DistributedDataParallel:
    module = Float16Module(model.config, model) if dtype == torch.bfloat16 else model
    chunk = DistributedDataParallel(
        config=model.config,
        ddp_config=ddp_config,
        module=module,
        disable_bucketing=not in_buckets,
    )
    chunk.broadcast_params()
    return chunk


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
