"""The engines of a run: which rank owns one, and how all ranks use them together."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import TrainingError
from megatron_tropd.failures import kind_of
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.rollout.types import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.weight_sync import WeightMailbox


class EnginePool:
    """One engine on the first rank of each of ``num_engines`` equal blocks of the world.

    Every method but :meth:`close` is collective: all ranks call it with the same arguments, and a
    failure of one engine is raised on all of them.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        num_engines: int,
        make_engine: Callable[[int], RolloutEngine],
    ) -> None:
        """Start this rank's engine, if it owns one.

        Args:
            rank: of this process.
            world_size: divisible by ``num_engines``.
            num_engines: how many engines the world has.
            make_engine: called with the engine's number on the rank that owns it.
        """
        block = world_size // num_engines
        self.owners = tuple(range(0, world_size, block))
        self._number = rank // block if rank in self.owners else None
        self._engine: RolloutEngine | None = None
        self._together(lambda: self._make(make_engine))

    @property
    def owns_engine(self) -> bool:
        """Whether this rank has an engine."""
        return self._number is not None

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request, spread evenly over the engines.

        Args:
            requests: the same list on every rank.
            sampling: shared settings.

        Returns:
            One sample per request, in order, on every rank.

        Collectives: one gather of the samples as objects.
        """
        engines = len(self.owners)

        def mine() -> list[Sample]:
            engine = self._engine
            if engine is None:
                return []
            try:
                return engine.generate(requests[self._number :: engines], sampling)
            finally:
                engine.sleep()

        parts = self._together(mine)
        samples: list[Any] = [None] * len(requests)
        for number, owner in enumerate(self.owners):
            samples[number::engines] = parts[owner]
        return samples

    def load_weights(self, folder: Path | None) -> None:
        """Give every engine the weights its rank wrote to ``folder`` (None on other ranks)."""

        def mine() -> None:
            if self._engine is not None and folder is not None:
                self._engine.load_weights(folder)

        self._together(mine)

    def load_tensors(
        self, tensors: Iterable[tuple[str, Tensor | None]], mailbox: WeightMailbox | None
    ) -> None:
        """Give every engine the weights that come out of ``tensors``.

        Args:
            tensors: HF names and tensors, ``None`` on ranks without an engine; exhausted on every
                rank, since making them is collective.
            mailbox: where a rank with an engine hands them over; None on the others.
        """
        if mailbox is None:
            for _ in tensors:
                pass
            self.load_weights(None)
        else:
            self.load_weights(mailbox.write(tensors))
            mailbox.clear()

    def sleep(self) -> None:
        """Give every engine's device memory back until the next call."""

        def mine() -> None:
            if self._engine is not None:
                self._engine.sleep()

        self._together(mine)

    def close(self) -> None:
        """End this rank's engine; not collective, harmless twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self, make_engine: Callable[[int], RolloutEngine]) -> None:
        if self._number is not None:
            self._engine = make_engine(self._number)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Run ``action`` everywhere; raise the first error on every rank, or return all results."""
        outcome: tuple[Any, Exception | None]
        try:
            outcome = (action(), None)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            outcome = (None, error)
        outcomes: list[Any] = [None] * dist.get_world_size()
        # As text: not every exception survives pickling.
        met = outcome[1]
        dist.all_gather_object(outcomes, (outcome[0], met and (str(met), kind_of(met))))
        if met is not None:
            raise met
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            message, kind = failures[0]
            raise TrainingError(message, kind=kind)
        return [result for result, _ in outcomes]
