"""The engine of one server: on the weights a batch asks for, and started again when it dies."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.data.samples import Sample
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.wire import Model, RequestBatch
from megatron_tropd.rollout.weights.versions import VISIBLE_SECONDS, WeightsName, WeightVersions

MOST_FAILURES = 5
"""Deaths of the engine without a batch finished in between, after which the server gives up."""
START_SECONDS = 3600.0
"""Longest start of an engine."""


class EngineKeeper:
    """Runs batches, one after the other; used by one thread, watched by others."""

    def __init__(
        self,
        make_engine: Callable[[Model], RolloutEngine],
        versions: WeightVersions,
        *,
        wait: Callable[[float], object],
        first_pause: float = 1.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            make_engine: starts an engine on the first weights of a model; may take long.
            versions: where the student's newer weights come from.
            wait: sleeps so many seconds, or less when the server ends.
            first_pause: seconds before an engine that died is started again; doubles each time.
        """
        self._make_engine = make_engine
        self._versions = versions
        self._wait = wait
        self._first_pause = first_pause
        self._engines: dict[Model, RolloutEngine] = {}
        self.state = "starting"
        """starting, loading, generating or ready."""
        self.weights: WeightsName | None = None
        """What the student's engine has; None: its first weights."""
        self.failures = 0
        """Deaths since the last batch that was finished."""
        self.restarts = 0
        """Starts of an engine after a death."""
        self.last_error = ""
        self._closed = False

    @property
    def engine_pid(self) -> int | None:
        """Process id of the student's engine."""
        engine = self._engines.get("student")
        return engine.pid if engine else None

    def start(self) -> None:
        """Have the student's engine ready, with a pause after each death.

        Raises:
            InputError, ConfigError: the model cannot be served.
            TrainingError: the engine died :data:`MOST_FAILURES` times.
        """
        while "student" not in self._engines:
            if self._closed:  # that is why the engine died
                raise TrainingError("The server ends.", kind="engine")
            if self.failures:
                self._wait(self._first_pause * 2 ** (self.failures - 1))
                self.restarts += 1
            try:
                self._start("student")
            except TrainingError as error:
                self._died("student", error)
                if self.given_up:
                    raise
        self.state = "ready"

    def run(self, batch: RequestBatch) -> list[Sample]:
        """The samples of a batch, from the weights it names.

        Raises:
            InputError: a request does not fit the model.
            TrainingError: the engine died or took too long, or the weights are not there.
        """
        try:
            folder = self._find(batch)
        finally:
            self.state = "ready"
        try:
            engine = self._engine_of(batch.model)
            if folder is not None:
                self._load(engine, batch.weights, folder)
            self.state = "generating"
            with _time_limit(engine, batch.seconds, "generating a batch"):
                samples = engine.generate(batch.requests, batch.sampling)
        except TrainingError as error:
            self._died(batch.model, error)
            raise
        finally:
            self.state = "ready" if "student" in self._engines else "starting"
        self.failures = 0
        return samples

    def close(self) -> None:
        """End the engines for good; from any thread."""
        self._closed = True
        for engine in list(self._engines.values()):
            engine.kill()
            engine.close()
        self._engines.clear()

    def _find(self, batch: RequestBatch) -> Path | None:
        """Where the weights of a batch are; None: the engine has them."""
        if batch.weights is None:
            if batch.model == "student":
                raise InputError(
                    "Expected a batch for the student to name its weights, found none."
                )
            return None
        if batch.weights == self.weights:
            return None
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            try:
                return self._versions.find(batch.weights)
            except TrainingError:
                if time.monotonic() > deadline:
                    raise
            self.state = "loading"
            self._wait(0.5)

    def _engine_of(self, model: Model) -> RolloutEngine:
        """The engine for a batch. The teacher's lives until the next batch for the student."""
        if model == "student" and "teacher" in self._engines:
            self._engines.pop("teacher").close()
        if model == "teacher" and "teacher" not in self._engines:
            self._engines["student"].sleep()
            if not self._engines["student"].has_weights:
                self.weights = None  # the next batch for the student loads what it names
            self._start("teacher")
        return self._engines[model]

    def _load(self, engine: RolloutEngine, name: WeightsName | None, folder: Path) -> None:
        self.state = "loading"
        with _time_limit(engine, START_SECONDS, "loading weights"):
            try:
                engine.load_weights(folder)
            except InputError as error:  # the trainer wrote them, not the user: a hiccup passes
                raise TrainingError(str(error), kind="disk") from None
        self.weights = name

    def _start(self, model: Model) -> None:
        self.state = "starting"
        engine = self._make_engine(model)
        self._engines[model] = engine
        with _time_limit(engine, START_SECONDS, "starting"):
            engine.wait_ready()
        if model == "student":
            self.weights = None

    def _died(self, model: Model, error: TrainingError) -> None:
        self.failures += 1
        self.last_error = str(error)
        print(f"engine: {error}", flush=True)
        if engine := self._engines.pop(model, None):
            engine.close()

    @property
    def given_up(self) -> bool:
        """Whether the engine died so often that starting it again is pointless."""
        return self.failures >= MOST_FAILURES


@contextmanager
def _time_limit(engine: RolloutEngine, seconds: float, doing: str) -> Iterator[None]:
    """Kill an engine that is not done in time; its death then says so."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        engine.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TrainingError as error:
        if expired.is_set():
            raise TrainingError(
                f"The engine was {doing} for more than {seconds:g} s.", kind="engine"
            ) from error
        raise
    finally:
        timer.cancel()
