"""The engines of a run as servers elsewhere: what :class:`EnginePool` does, over HTTP.

Only rank 0 talks to the servers; what it gets reaches the others through their process group.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from torch import Tensor

from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.collective import run_and_share, run_everywhere
from megatron_tropd.rollout.engines.client import ClientSettings, ServerClient
from megatron_tropd.rollout.engines.dispatch import Dispatch, Patience
from megatron_tropd.rollout.engines.pool import cut_batches, merge_batches
from megatron_tropd.rollout.engines.wire import Model, RequestBatch
from megatron_tropd.rollout.weights.weight_sync import WeightsName, WeightVersions


class ServerPool:
    """``num_servers`` servers behind the methods of :class:`EnginePool`.

    The requests of a call are cut into batches by index, as many as there are servers by the
    config: so the cut, and with it every bit of the samples, is that of as many colocated engines
    and does not depend on which servers are alive.
    """

    owners = receivers = (0,)

    def __init__(
        self,
        known: ClientSettings,
        versions: WeightVersions,
        *,
        rank: int,
        num_servers: int,
        model: Model = "student",
        patience: Patience,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Nothing is asked yet: servers may still be starting, or start later.

        Args:
            known: how servers are found and recognised.
            versions: where they get weights from.
            rank: of this process.
            num_servers: ``rollout.num_engines``.
            model: whose samples are asked for.
            patience: time-outs.
            stopping: whether the run was asked to stop; it then waits less for servers.
        """
        self.owns_engine = rank == 0
        self._known = known
        self._versions = versions
        self._count = num_servers
        self._model = model
        self._patience = patience
        self._stopping = stopping
        self._writer = uuid.uuid4().hex[:8]
        self._weights: WeightsName | None = None
        self._pending: Dispatch | None = None
        self._pending_version = 0
        self._asked = False

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request on whichever servers are there.

        Args:
            requests: the same list on every rank.
            sampling: shared settings.

        Returns:
            One sample per request, in order, on every rank.

        Raises:
            ServersLost: no server has answered for a bounded time.
            TrainingError: engines died over one batch again and again.
            InputError: a request does not fit the model.

        Collectives: those of :func:`~megatron_tropd.rollout.collective.run_and_share`.
        """
        return self._collect(lambda: self._after_pending(requests, sampling))

    def start_generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Ask for samples of the newest weights without waiting; one call at a time."""
        assert not self._asked, "start_generate before finish_generate"
        self._asked = True
        if self.owns_engine:
            self._pending = self._dispatch(requests, sampling)
            self._pending_version = self._weights.version if self._weights else 0

    def finish_generate(self) -> list[Sample]:
        """The samples of the last :meth:`start_generate`, on every rank; as :meth:`generate`."""
        assert self._asked, "finish_generate without start_generate"
        samples = self._collect(lambda: self._pending)
        self._pending, self._asked = None, False
        return samples

    def load_tensors(self, tensors: Iterable[tuple[str, Tensor | None]], *, version: int) -> None:
        """Hand over the weights that come out of ``tensors``.

        They go through the folder: a server loads them when it is first asked for samples of them.

        Args:
            tensors: HF names and tensors, ``None`` but on rank 0; exhausted on every rank, since
                making them is collective.
            version: optimizer steps they have seen.

        Raises:
            TrainingError: they cannot be written.

        Collectives: those of ``tensors``, a gather of the outcome.
        """
        name = WeightsName(version, self._writer)
        run_everywhere(lambda: self._hand_over(name, tensors))
        self._weights = name

    def sleep(self) -> None:
        """Nothing: servers share no device with the trainer."""

    def close(self) -> None:
        """Remove the versions of the weights; servers end when the run is complete."""
        if self._weights is not None and self.owns_engine:
            self._versions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_pending(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Dispatch:
        if self._pending is not None:
            self._pending.wait()
        return self._dispatch(requests, sampling)

    def _dispatch(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Dispatch:
        call, seconds = uuid.uuid4().hex, self._patience.batch_seconds
        weights = self._weights if self._model == "student" else None
        batches = [
            RequestBatch(f"{call}-{index}", self._model, weights, tuple(batch), sampling, seconds)
            for index, batch in enumerate(cut_batches(requests, self._count))
        ]
        clients = [ServerClient(self._known, number) for number in range(self._count)]
        return Dispatch(batches, clients, self._patience, self._stopping)

    def _collect(self, dispatch: Callable[[], Dispatch | None]) -> list[Sample]:
        def mine() -> list[Sample]:
            if not self.owns_engine or (asked := dispatch()) is None:
                return []
            return merge_batches([batch.samples for batch in asked.wait()])

        return run_and_share(mine, self.owners)[0]

    def _hand_over(self, name: WeightsName, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
        tensors = iter(tensors)
        try:
            if self.owns_engine:
                oldest = self._pending_version if self._pending is not None else name.version
                self._versions.prune(oldest, name.version)
                self._versions.write(name, tensors)
        finally:
            for _ in tensors:  # making them is collective, also where they are not needed
                pass
