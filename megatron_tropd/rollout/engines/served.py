"""The engines of a run as servers elsewhere: what :class:`EnginePool` does, over HTTP.

Only rank 0 talks to the servers; what it gets reaches the others through their process group.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

from megatron_tropd.data.collective import run_and_share
from megatron_tropd.data.dispatch import Dispatch, Patience, Words
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.client import ClientSettings, ServerClient
from megatron_tropd.rollout.engines.pool import cut_batches, merge_batches
from megatron_tropd.rollout.engines.wire import BatchSamples, Model, RequestBatch
from megatron_tropd.rollout.weights.versions import VersionChannel, WeightVersions

ROLLOUT_SERVERS = Words(
    "rollout server",
    "Start the servers (`tropd serve CONFIG --number K`) and the same command again to resume.",
)
_Samples = Dispatch[RequestBatch, BatchSamples]


class ServerPool:
    """``num_servers`` servers as
    :class:`~megatron_tropd.rollout.engines.interface.SamplingEngines`.

    The requests of a call are cut into batches by index, as many as there are servers by the
    config: so the cut, and with it every bit of the samples, is that of as many colocated engines
    and does not depend on which servers are alive.
    """

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
            stopping: whether the run was asked to stop; it then waits less for servers.
        """
        self.channel = VersionChannel(versions, is_writer=rank == 0)
        self._is_main = rank == 0
        self._known = known
        self._count = num_servers
        self._model = model
        self._patience = patience
        self._stopping = stopping
        self._pending: _Samples | None = None
        self._asked = False

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request on whichever servers are there.

        Raises:
            ServersLost: no server has answered for a bounded time.
            TrainingError: engines died over one batch again and again.
            InputError: a request does not fit the model.

        Collectives: those of :func:`~megatron_tropd.data.collective.run_and_share`.
        """
        return self._collect(lambda: self._after_pending(requests, sampling))

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Ask for samples of the newest weights without waiting; one call at a time."""
        assert not self._asked, "start before finish"
        self._asked = True
        if self._is_main:
            self._pending = self._dispatch(requests, sampling)
            self.channel.needed = self.channel.name

    def finish(self) -> list[Sample]:
        """The samples of the last :meth:`start`, on every rank; as :meth:`generate`."""
        assert self._asked, "finish without start"
        samples = self._collect(lambda: self._pending)
        self._pending, self._asked = None, False
        self.channel.needed = None
        return samples

    def arrived(self) -> list[Sample] | None:
        """What the servers have made, once it is all there; on rank 0."""
        made = None if (asked := self._pending) is None else asked.made()
        return None if made is None else merge_batches([batch.samples for batch in made])

    def awake(self) -> AbstractContextManager[None]:
        """Nothing: servers share no device with the trainer."""
        return nullcontext()

    def close(self) -> None:
        """Remove the versions of the weights; servers end when the run is complete."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _after_pending(self, requests: Sequence[SampleRequest], sampling: Sampling) -> _Samples:
        if self._pending is not None:
            self._pending.wait()
        return self._dispatch(requests, sampling)

    def _dispatch(self, requests: Sequence[SampleRequest], sampling: Sampling) -> _Samples:
        call, seconds = uuid.uuid4().hex, self._patience.batch_seconds
        weights = self.channel.name if self._model == "student" else None
        batches = [
            RequestBatch(f"{call}-{index}", self._model, weights, tuple(batch), sampling, seconds)
            for index, batch in enumerate(cut_batches(requests, self._count))
        ]
        clients = [ServerClient(self._known, number) for number in range(self._count)]
        return Dispatch(batches, clients, self._patience, self._stopping, words=ROLLOUT_SERVERS)

    def _collect(self, dispatch: Callable[[], _Samples | None]) -> list[Sample]:
        def mine() -> list[Sample]:
            if not self._is_main or (asked := dispatch()) is None:
                return []
            return merge_batches([batch.samples for batch in asked.wait()])

        return run_and_share(mine, (0,))[0]
