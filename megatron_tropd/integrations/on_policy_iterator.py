"""On-policy data as the data iterator of ``--dataloader-type external``, for any step function.

Sampling is collective, and pipeline stages ask for their first micro-batch one after another, so
it cannot wait for the iterator to be asked. It happens when the loop clears the gradients, which
every rank does at the start of a step; for that the step function is wrapped
(:meth:`OnPolicyIterator.watch_steps`). A loop of one's own calls :meth:`OnPolicyIterator.refill`.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.data.recorded import training_item
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.integrations.global_batch import deal
from megatron_tropd.integrations.on_policy_data import LoopSettings, OnPolicyData, check_arguments
from megatron_tropd.mcore.layout import current_layout

LoaderBatch = dict[str, Tensor]


class OnPolicyIterator:
    """An endless iterator of micro-batches, sampled anew for every global batch."""

    def __init__(self, rollouts: OnPolicyData) -> None:
        """Nothing is started yet.

        Args:
            rollouts: who samples; closing it is the caller's.
        """
        self.trajectories: list[TokenSequence] = []
        """Of the current global batch, the same on every rank."""
        self.step = 0
        """Optimizer steps the student has seen when the next global batch is sampled."""
        self._rollouts = rollouts
        self._models: list[torch.nn.Module] = []
        self._batches: deque[LoaderBatch] = deque()
        self._source: Any = None

    def start(
        self, model: torch.nn.Module, loop: LoopSettings, *, micro_batch_size: int, step: int = 0
    ) -> None:
        """Start the engines for a loop of one's own. Collective.

        Args:
            model: this rank's GPTModel, not wrapped.
            micro_batch_size: B, rows of a micro-batch.
            step: optimizer steps the student has seen.

        Raises:
            As :meth:`OnPolicyData.start`; ConfigError: the samples of a step are no whole number
            of micro-batches on every replica.

        Collectives: those of :meth:`OnPolicyData.start`.
        """
        self._rollouts.start(loop, dtype=next(model.parameters()).dtype)
        self._take_up(model, loop.seq_length, micro_batch_size, step)

    def refill(self) -> None:
        """Sample the next global batch with the student's weights of now.

        Collective, on every rank and outside of the pipeline's schedule. What is left of the last
        global batch is dropped.

        Raises:
            As :meth:`OnPolicyData.sample`.

        Collectives: those of :meth:`OnPolicyData.sample`.
        """
        self.trajectories = self._rollouts.sample(self._model, self.step)
        items = [training_item(sequence, self._seq_length) for sequence in self.trajectories]
        self._batches = deque(deal(items, self._rows, self._dp_rank, self._dp_size))
        self._source = None
        self.step += 1

    def __iter__(self) -> Iterator[LoaderBatch]:
        return self

    def __next__(self) -> LoaderBatch:
        """This data-parallel rank's next micro-batch, the same on all ranks of a replica.

        Returns:
            Tensors of :func:`megatron_tropd.data.recorded.training_item`, [B, S] and [B], on the
            host.

        Raises:
            TrainingError: the global batch is used up and nobody sampled another.
        """
        if not self._batches:
            raise TrainingError(
                "Expected rollouts to be there before the step, found none left. Wrap the step "
                "function with watch_steps, or call refill between the steps."
            )
        return self._batches.popleft()

    def watch_model(self, model_provider: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a model provider of ``pretrain``: the model it makes is the one that samples."""

        @functools.wraps(model_provider)
        def provide(*args: Any, **kwargs: Any) -> Any:
            self._models.append(model_provider(*args, **kwargs))
            return self._models[-1]

        return provide

    def watch_steps(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step function of ``pretrain``: rollouts are renewed between the steps."""

        @functools.wraps(forward_step)
        def step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            # Megatron wraps the iterator; evaluation brings other ones.
            if getattr(data_iterator, "iterable", data_iterator) is self:
                self._source = data_iterator
                self._watch_gradients(model)
            return forward_step(data_iterator, model, *args, **kwargs)

        return step

    def datasets_provider(self, num_samples: Any) -> tuple[Self, None, None]:
        """Data provider of ``pretrain``: starts the engines and samples the first global batch.

        Args:
            num_samples: unused; a global batch is sampled when it is needed.

        Returns:
            This iterator for training; nothing for validation and test.

        Raises:
            As :meth:`start`; ConfigError: Megatron's arguments exclude live rollouts.

        Collectives: those of :meth:`start` and :meth:`refill`.
        """
        from megatron.training import get_args

        args, seen = get_args(), len(self._models)
        check_arguments(
            args,
            self._rollouts.settings.rollout,
            [
                (args.dataloader_type != "external", "--dataloader-type external"),
                (seen != 1, f"watch_model to see one model on each rank (it saw {seen})"),
            ],
        )
        (model,) = self._models
        self._rollouts.start_for_pretrain(model)
        self._take_up(model, args.seq_length, args.micro_batch_size, args.iteration)
        self.refill()
        return self, None, None

    # Megatron: every rank calls the provider, not only the first of each tensor-parallel group.
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]

    def _take_up(
        self, model: torch.nn.Module, seq_length: int, micro_batch_size: int, step: int
    ) -> None:
        self._model, self._seq_length, self.step = model, seq_length, step
        layout, rollout = current_layout(), self._rollouts.settings.rollout
        self._dp_rank, self._dp_size, self._rows = layout.dp_rank, layout.dp_size, micro_batch_size
        batch = rollout.prompts_per_step * rollout.samples_per_prompt
        if batch % (micro_batch_size * layout.dp_size):
            raise ConfigError(
                f"rollout.prompts_per_step x samples_per_prompt = {batch} must be a multiple of "
                f"micro-batch size x data-parallel size = {micro_batch_size} x {layout.dp_size}."
            )

    def _watch_gradients(self, model: Any) -> None:
        """Refill when the loop clears the gradients of a step that comes after a used batch."""
        clear = model.zero_grad_buffer
        if hasattr(clear, "__wrapped__"):
            return

        @functools.wraps(clear)
        def clear_and_refill() -> None:
            clear()
            # A step that Megatron repeats, to see whether it computes the same, gets the same data.
            if self._source is not None and not getattr(self._source, "replaying", False):
                self.refill()

        model.zero_grad_buffer = clear_and_refill
