"""Batches on their way through servers: a queue, and one thread for each client of a server.

A server takes the next batch when it is free, so the least loaded one does. A batch whose server
died, hung or failed goes back into the queue for the next server that is ready. What a batch is,
and how it is made, its client knows: samples of a rollout server, scores of a served teacher.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, Self

from megatron_tropd.base.errors import ServersLost, TrainingError
from megatron_tropd.config.settings import Amount, Count, Settings


class ServerError(RuntimeError):
    """A server did not do its work: another one should."""


class BatchError(ServerError):
    """A server that answers failed over a batch."""


class Client[Batch, Made](Protocol):
    """Talks to one server; used by one thread."""

    number: int
    """Of the server."""

    def state(self) -> str | None:
        """What the server does: "ready", or something else; None: another client finds out.

        Raises:
            ServerError: it is not there or refuses us; says why.
        """

    def make(self, batch: Batch, *, wanted: Callable[[], bool]) -> Made:
        """Have a batch made.

        Args:
            wanted: false once nobody waits for it any more.

        Raises:
            ServerError: the server failed.
            Exception: no server could do better.
        """

    def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True)
class Patience(Settings):
    """How long to wait for what."""

    lost_seconds: Amount = 600.0
    """No server has answered for so long: the run cannot go on."""
    stopping_seconds: Amount = 10.0
    """The same for a run that was asked to stop."""
    first_pause: Amount = 0.25
    """Before a server that failed is asked again; doubles each time, with jitter."""
    longest_pause: Amount = 10.0
    batch_seconds: Amount = 1800.0
    """Longest time an engine may take for one batch."""
    batch_failures: Count = 5
    """Engines that may die over one batch."""

    @classmethod
    def within(cls, phase_seconds: float) -> Self:
        """For a trainer whose phases may last so long: its watchdog must not come first."""
        half = phase_seconds / 2
        return cls(
            lost_seconds=min(cls.lost_seconds, half),
            batch_seconds=half,
        )


@dataclass(frozen=True)
class Words:
    """How messages call the servers."""

    server: str
    advice: str
    """What to do if all are lost."""


@dataclass
class _Progress[Made]:
    """What all threads of a dispatch know; guarded by ``changed``."""

    waiting: deque[int]
    made: dict[int, Made] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    troubles: dict[int, str] = field(default_factory=dict)
    error: Exception | None = None
    last_answer: float = field(default_factory=time.monotonic)
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


class Dispatch[Batch, Made]:
    """Some batches being made; :meth:`wait` has what was made of them."""

    def __init__(
        self,
        batches: Sequence[Batch],
        clients: Sequence[Client[Batch, Made]],
        patience: Patience,
        stopping: Callable[[], bool] = lambda: False,
        *,
        words: Words,
    ) -> None:
        """Start at once, in the background.

        Args:
            batches: in the order of the result.
            clients: of this dispatch alone; as many of one server as it is to make batches at once.
            stopping: whether the run was asked to stop.
        """
        self._batches = batches
        self._stopping = stopping
        self._patience = patience
        self._words = words
        self._now: _Progress[Made] = _Progress(deque(range(len(batches))))
        for client in clients:
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def wait(self) -> list[Made]:
        """What was made of every batch, in order.

        Raises:
            ServersLost: no server answered for ``lost_seconds``; says what was wrong with each.
            TrainingError: a batch failed again and again.
            InputError: a batch can be made by no server.
        """
        now = self._now
        with now.changed:
            while not self._over() and not self._lost():
                now.changed.wait(0.5)
            now.closed = True
            now.changed.notify_all()
            if now.error is not None:
                raise now.error
            if len(now.made) < len(self._batches):
                raise ServersLost(self._what_was_wrong())
            return [now.made[index] for index in range(len(self._batches))]

    def made(self) -> list[Made] | None:
        """What was made of the batches, if it is there; at once."""
        with self._now.changed:
            if self._now.error is not None or len(self._now.made) < len(self._batches):
                return None
            return [self._now.made[index] for index in range(len(self._batches))]

    def _over(self) -> bool:
        return self._now.error is not None or len(self._now.made) == len(self._batches)

    def _lost(self) -> bool:
        patience = self._patience
        limit = patience.stopping_seconds if self._stopping() else patience.lost_seconds
        return time.monotonic() - self._now.last_answer > limit

    def _what_was_wrong(self) -> str:
        each = "; ".join(f"server {n} {why}" for n, why in sorted(self._now.troubles.items()))
        seconds = time.monotonic() - self._now.last_answer
        return (
            f"No {self._words.server} has answered for {seconds:.0f} s: {each}. "
            f"{self._words.advice}"
        )

    def _serve(self, client: Client[Batch, Made]) -> None:
        """The life of one thread: batches for one server until none is left."""
        failures = 0
        while not self._finished():
            try:
                state = client.state()
                if state is not None:
                    self._answered(client, f"is {state}")
                if state != "ready":
                    self._pause(1)
                    continue
                self._one_batch(client)
                failures = 0
            except ServerError as error:
                failures += 1
                self._troubled(client, str(error))
                self._pause(failures)
            except Exception as error:  # no server could do better
                self._fail(error)
        client.close()

    def _one_batch(self, client: Client[Batch, Made]) -> None:
        index = self._take()
        if index is None:
            return
        try:
            made = client.make(self._batches[index], wanted=partial(self._wanted, client))
        except BaseException as error:
            self._give_back(index, error)
            raise
        with self._now.changed:
            self._now.made[index] = made
            self._now.last_answer = time.monotonic()
            self._now.changed.notify_all()

    def _take(self) -> int | None:
        """The next batch; waits while others may still give one back."""
        now = self._now
        with now.changed:
            now.changed.wait_for(lambda: now.waiting or now.closed or self._over(), 5.0)
            return now.waiting.popleft() if now.waiting and not now.closed else None

    def _give_back(self, index: int, error: BaseException) -> None:
        now = self._now
        with now.changed:
            now.waiting.appendleft(index)
            if isinstance(error, BatchError):
                now.failures[index] = now.failures.get(index, 0) + 1
                if now.failures[index] >= self._patience.batch_failures:
                    now.error = TrainingError(
                        f"Batch {index} of {len(self._batches)} failed {now.failures[index]} "
                        f"times, at last: a server {error}",
                        kind="engine",
                    )
            now.changed.notify_all()

    def _finished(self) -> bool:
        with self._now.changed:
            return self._now.closed or self._over()

    def _wanted(self, client: Client[Batch, Made]) -> bool:
        self._answered(client, "is generating")
        return not self._finished()

    def _answered(self, client: Client[Batch, Made], state: str) -> None:
        with self._now.changed:
            self._now.last_answer = time.monotonic()
            self._now.troubles[client.number] = state

    def _troubled(self, client: Client[Batch, Made], trouble: str) -> None:
        with self._now.changed:
            news = self._now.troubles.get(client.number) != trouble
            if news and not self._now.closed and not self._over():
                print(f"{self._words.server} {client.number} {trouble}", flush=True)
            self._now.troubles[client.number] = trouble

    def _fail(self, error: Exception) -> None:
        with self._now.changed:
            self._now.error = self._now.error or error
            self._now.changed.notify_all()

    def _pause(self, failures: int) -> None:
        """Exponential back-off with jitter; over early when the batches are done."""
        longest = min(self._patience.longest_pause, self._patience.first_pause * 2**failures)
        now = self._now
        with now.changed:
            seconds = longest * random.uniform(0.5, 1.0)
            now.changed.wait_for(lambda: now.closed or self._over(), seconds)
