"""Several engines of one command, side by side on GPUs (or threads) of their own.

No process group is needed: an engine is a process already, and a call cuts its requests as an
:class:`~megatron_tropd.rollout.engines.pool.EnginePool` of as many engines does.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Self

import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.pool import cut_batches, merge_batches


class EngineGroup:
    """Engines that share each call's requests. A context manager."""

    def __init__(
        self, count: int, make: Callable[[int, int], RolloutEngine], *, tensor_parallel: int = 1
    ) -> None:
        """Start them; returns while they are still starting.

        Args:
            make: called with the number of an engine and its CPU threads.
            tensor_parallel: GPUs of each.

        Raises:
            ConfigError: there are fewer GPUs, or cores without CUDA.
            As ``make``.
        """
        gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
        most = gpus // tensor_parallel if gpus else cores
        if not 1 <= count <= most:
            of = f"{gpus} GPUs, {tensor_parallel} for each engine" if gpus else f"{cores} cores"
            raise ConfigError(f"--engines must be in 1..{most} here ({of}), found {count}.")
        threads = cores // count
        self._engines: list[RolloutEngine] = []
        self._exits = ExitStack()
        with ExitStack() as begun:  # an engine that cannot start ends the others
            for number in range(count):
                first = torch.cuda.device(number * tensor_parallel) if gpus else nullcontext()
                with first:
                    self._engines.append(begun.enter_context(make(number, threads)))
            self._exits = begun.pop_all()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request, spread evenly over the engines; one sample each, in order."""
        if len(self._engines) == 1:
            return self._engines[0].generate(requests, sampling)
        batches = cut_batches(requests, len(self._engines))
        busy = [pair for pair in zip(self._engines, batches, strict=True) if pair[1]]
        for engine, batch in busy:
            engine.start_generate(batch, sampling)
        done = [engine.finish_generate() for engine, _ in busy]
        return merge_batches([*done, *([[]] * (len(batches) - len(busy)))])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
