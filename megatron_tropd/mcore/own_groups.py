"""A second layout on the same ranks: Megatron's process groups once more, for another model.

Megatron-Core 0.19 takes a ``ProcessGroupCollection`` when a model is built: ``GPTModel``, its
block, layers, attention, experts, embeddings and rotary positions keep the groups they are given.
Yet some of it still reads the globals of ``parallel_state``, of which there is one set:

- while a model is built: the linear layers of Megatron and of Transformer Engine
  (``use_mpu_process_groups``);
- while it runs: the choice of a schedule (``get_forward_backward_func``), its groups and neighbours
  unless it is given a communicator of its own, the stage that calls the loss function
  (``forward_step_calc_loss``), and sums and gathers that name no group, ours in ``hidden.py``;
- while a checkpoint is read: ``sharded_state_dict`` of every module that is told no group.

A few of these take groups by other doors, others have none. So the globals are swapped as a whole
while a model of the second layout is built, filled or run (:meth:`OwnGroups.current`); the student
never runs meanwhile. One thread of a rank uses Megatron at a time. The buffer for gathered
activations is one for both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state

from megatron_tropd.config import ParallelConfig
from megatron_tropd.mcore.layout import Layout, axis_sizes, current_layout

_SHARED = "_GLOBAL_MEMORY_BUFFER"


class OwnGroups:
    """Process groups of a layout beside the one that ``parallel.initialize`` has set up."""

    def __init__(
        self, parallel: ParallelConfig, *, pad_multiple: int, timeout_seconds: float
    ) -> None:
        """Make them; collective, on all ranks.

        Args:
            parallel: sizes of the axes, over all ranks of the run.
            pad_multiple: of the lengths of rows.
            timeout_seconds: after which a collective of any of them fails.
        """
        self.parallel = parallel
        outer = _globals()
        _set({name: {} if isinstance(value, dict) else None for name, value in outer.items()})
        try:
            parallel_state.initialize_model_parallel(
                **axis_sizes(parallel),
                distributed_timeout_minutes=timeout_seconds / 60,  # as in parallel.initialize
                create_gloo_process_groups=False,  # an optimizer's
            )
            self.layout: Layout = current_layout(pad_multiple=pad_multiple)
            self._own = _globals() | {_SHARED: outer[_SHARED]}
        finally:
            _set(outer)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let Megatron's globals be these groups until the block is left."""
        outer = _globals()
        _set(self._own)
        try:
            yield
        finally:
            _set(outer)


def _globals() -> dict[str, Any]:
    """Megatron's groups, ranks and sizes, by their names."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.isupper()
    }


def _set(values: dict[str, Any]) -> None:
    vars(parallel_state).update(values)
