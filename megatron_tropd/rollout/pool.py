"""The engines of a run: which rank owns one, and how all ranks use them together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import ConfigError, InputError, TrainingError
from megatron_tropd.failures import kind_of
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.rollout.types import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.weight_sync import WeightMailbox

_SHARED = (ConfigError, InputError, TrainingError, OSError)
"""Errors after which a rank can still take part in what follows."""


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
        self._mailbox: WeightMailbox | None = None
        self._asked = False
        self._settled: list[Sample] | None = None
        self._tensors: Iterable[tuple[str, Tensor | None]] = iter(())
        self._filled = True
        """Whether the engines have weights; those that they start with, at first."""
        self._forgetful = any(together(lambda: self._make(make_engine)))

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

        Collectives: those of :func:`share`; as many more where others were asked for before, and
        those of :meth:`load_tensors` where the engines dropped their weights.
        """
        self._settle()
        self._fill()
        units = self._cut(requests)
        samples = merge_units(share(lambda: self._generate(units, sampling), self.owners))
        self._slept()
        return samples

    def start_generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Ask for samples without waiting; one call at a time may be under way.

        Args and errors as :meth:`generate`.

        Collectives: one gather of the outcome, and those of :meth:`load_tensors` where the engines
        dropped their weights.
        """
        assert not self._asked, "start_generate before finish_generate"
        self._fill()
        units = self._cut(requests)

        def mine() -> None:
            if self._engine is not None and self._number is not None:
                self._engine.start_generate(units[self._number], sampling)

        together(mine)
        self._asked, self._settled = True, None

    def finish_generate(self) -> list[Sample]:
        """The samples of the last :meth:`start_generate`, on every rank.

        Collectives: those of :func:`share`.
        """
        assert self._asked, "finish_generate without start_generate"
        self._settle()
        samples, self._asked, self._settled = self._settled, False, None
        assert samples is not None
        return samples

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor | None]], *, version: int) -> None:
        """Give every engine the weights that come out of ``tensors``.

        Args:
            tensors: HF names and tensors, ``None`` on ranks without an engine; exhausted on every
                rank, since making them is collective. Gone through again if the same weights are
                sampled after a sleep, so no iterator where engines sleep
                (:class:`~megatron_tropd.rollout.weight_sync.Export`).
            version: optimizer steps they have seen.

        Collectives: those of ``tensors``, a gather of the outcome, and those of :func:`share` for
        samples that were asked for and are still being made: they are of the weights before.
        """
        self._settle()
        self._tensors = tensors
        together(lambda: self._load(tensors))
        self._filled = True

    def sleep(self) -> None:
        """Give every engine's device memory back until the next call."""

        def mine() -> None:
            if self._engine is not None:
                self._engine.sleep()

        together(mine)
        self._slept()

    def close(self) -> None:
        """End this rank's engine; not collective, harmless twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, make_engine: Callable[[int], RolloutEngine]) -> bool:
        if self._number is None:
            return False
        self._engine = make_engine(self._number)
        self._mailbox = WeightMailbox()
        return self._engine.forgets

    def _slept(self) -> None:
        self._filled = self._filled and not self._forgetful

    def _fill(self) -> None:
        """Give engines that slept since they got their weights the same ones again."""
        if self._filled:
            return
        if isinstance(self._tensors, Iterator):
            raise TrainingError(
                "Engines dropped their weights when they slept and have been given none since that "
                "can be given again.",
                kind="engine",
            )
        together(lambda: self._load(self._tensors))
        self._filled = True

    def _load(self, again: Iterable[tuple[str, Tensor | None]]) -> None:
        folder, tensors = None, iter(again)
        try:
            if self._mailbox is not None:
                folder = self._mailbox.write(tensors)
        finally:
            for _ in tensors:  # making them is collective, also where they cannot be written
                pass
        if torch.cuda.is_available():
            # What torch keeps for later is memory the waking engine needs.
            torch.cuda.empty_cache()
        if self._engine is not None and self._mailbox is not None and folder is not None:
            self._engine.load_weights(folder)
            self._mailbox.clear()

    def _cut(self, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
        return cut_units(requests, len(self.owners))

    def _generate(self, units: list[list[SampleRequest]], sampling: Sampling) -> list[Sample]:
        if self._engine is None or self._number is None:
            return []
        with asleep_after(self._engine) as engine:
            return engine.generate(units[self._number], sampling)

    def _fetch(self) -> list[Sample]:
        if self._engine is None:
            return []
        with asleep_after(self._engine) as engine:
            return engine.finish_generate()

    def _settle(self) -> None:
        """Wait for samples that were asked for and keep them: engines do one thing at a time."""
        if not self._asked or self._settled is not None:
            return
        self._settled = merge_units(share(self._fetch, self.owners))
        self._slept()


@contextmanager
def asleep_after(engine: RolloutEngine) -> Iterator[RolloutEngine]:
    """Use an engine; its device memory is the trainer's again on the way out.

    Every way of sampling goes through here, so that none can leave an engine awake. It wakes by
    itself: its memory for weights to take them, its cache to generate.
    """
    try:
        yield engine
    except BaseException:
        with suppress(TrainingError):  # it may be gone: the first error says why
            engine.sleep()
        raise
    engine.sleep()


def cut_units[T](requests: Sequence[T], count: int) -> list[list[T]]:
    """Cut into ``count`` units, by index alone: unit i has requests i, i + count, ..."""
    return [list(requests[number::count]) for number in range(count)]


def merge_units[T](units: Sequence[Sequence[T]]) -> list[T]:
    """Inverse of :func:`cut_units`."""
    merged: list[Any] = [None] * sum(map(len, units))
    for number, unit in enumerate(units):
        merged[number :: len(units)] = unit
    return merged


def share[T](action: Callable[[], T], owners: Sequence[int]) -> list[T]:
    """Run ``action`` on every rank; what it returned on each of ``owners``, on every rank.

    Raises:
        As :func:`together`.

    Collectives: one gather of the outcome, one broadcast of objects from each owner.
    """
    mine: list[T] = []
    together(lambda: mine.append(action()))
    shared = []
    for owner in owners:
        # Not through the gather: that takes room for every rank's share, as large as the largest.
        part = list(mine)
        dist.broadcast_object_list(part, src=owner)
        shared += part
    return shared


def together(action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` on every rank and gather what it returned.

    Returns:
        The results, by rank.

    Raises:
        The first error, on every rank: as it was raised where it was, elsewhere as ConfigError,
        InputError, or TrainingError of the same kind. An error nobody foresaw (CUDA out of memory,
        a lost connection) is raised on its rank alone, which then has to end.

    Collectives: one gather of objects.
    """
    outcome: tuple[Any, Exception | None]
    try:
        outcome = (action(), None)
    except _SHARED as error:
        # Not any other: ``action`` may contain collectives, in which the others would wait for us
        # while we wait for them below, and the reason would never be told.
        outcome = (None, error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    # As text: not every exception survives pickling.
    met = outcome[1]
    dist.all_gather_object(outcomes, (outcome[0], met and (str(met), kind_of(met))))
    if met is not None:
        raise met
    for _, failure in outcomes:
        if failure is not None:
            raise _as_error(*failure)
    return [result for result, _ in outcomes]


def _as_error(message: str, kind: str) -> Exception:
    known = {"config": ConfigError, "input": InputError}
    return known[kind](message) if kind in known else TrainingError(message, kind=kind)
