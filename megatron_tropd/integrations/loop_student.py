"""The student as Megatron's own loop runs it: its schedule, in place of the trainer's."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.data.batch import MicroBatch


class LoopStudent:
    """One call of the loop's schedule: a ``distill.step_parts.StudentPasses``."""

    def __init__(self, schedule: Callable[..., Any], model: Any, settings: dict[str, Any]) -> None:
        """Run nothing yet.

        Args:
            model: this stage's chunk as Megatron wrapped it, or a list of its chunks.
            settings: the other arguments of the call, without the data.
        """
        from megatron_tropd.mcore.hidden import unwrap

        self._schedule, self._model, self._settings = schedule, model, settings
        self.chunks = [unwrap(part) for part in (model if isinstance(model, list) else [model])]

    @property
    def module(self) -> Any:
        """The last chunk, which has the output layer on the last stage."""
        return self.chunks[-1]

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Hidden states of the loss tokens with the weights of now, no gradient, no dropout."""
        from megatron_tropd.mcore.schedule import hidden_states

        was_training = self.module.training
        try:
            return hidden_states(self.chunks, micro_batches)
        finally:
            for chunk in self.chunks:
                chunk.train(was_training)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_fn: Any) -> Any:
        """Call the schedule; its ``forward_step_func`` is one of ``megatron_lm.distilling``."""
        each = [Distilled(micro_batches, loss_fn) for _ in self.chunks]
        return self._schedule(
            data_iterator=each if len(each) > 1 else each[0], model=self._model, **self._settings
        )


class Distilled:
    """The micro-batches of a step and their loss, in place of Megatron's data iterator."""

    def __init__(self, batches: Sequence[MicroBatch], loss_fn: Any) -> None:
        self._batches, self._loss_fn = enumerate(batches), loss_fn

    def forward_step(self, model: Any) -> tuple[Tensor, Callable[..., Any]]:
        """Megatron's ``forward_step`` of the next micro-batch."""
        from megatron_tropd.mcore.schedule import student_forward

        return student_forward(self._batches, model, loss_fn=self._loss_fn)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise ConfigError(
            "While distilling, micro-batches carry the teacher's scores, which pretrain's "
            "forward_step_func does not know. Pass megatron_lm.distilling(forward_step)."
        )
