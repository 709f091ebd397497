"""A rollout server: HTTP in front of one engine, and the loop that keeps both alive.

    GET  /health          anyone: the process lives (its engine may still be starting)
    GET  /status          what it does, which weights it has, how often its engine died
    POST /batches           take a batch; 202, also when it has it already; 409 while it has another
    GET  /batches/ID?wait=s its samples (200), not yet (202), or why there are none (400, 500)

All but /health want ``Authorization: Bearer TOKEN``. Bodies are msgpack (:mod:`.wire`), never
pickle. One thread runs the engine, so a server answers while its engine starts or generates.

Why not ``vllm serve`` with its end points for RL (read in vLLM 0.32, below ``vllm/entrypoints``):

- A batch must begin as a whole, or its last bits depend on when each request arrived. Between
  ``/pause?mode=keep`` and ``/resume`` requests could gather, but ``/inference/v1/generate`` answers
  when a request is done (``scale_out/token_in_token_out/api_router.py``): nothing says that all are
  queued.
- A request that is sent again is sampled again; here a batch is kept under its id.
- ``/update_weights`` has no backend that reads a folder (vllm/distributed/weight_transfer,
  ``factory.py``); ``/collective_rpc`` could, and runs any other method for whoever reaches it.
- When the engine dies, the server ends (``launchers/launcher.py``, ``terminate_if_errored``), and
  a teacher is another model. So keeper, announcement and token would stay beside it, in front of
  one more process.
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from uvicorn import Config as HttpConfig
from uvicorn import Server as HttpServer

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.rollout.engines import wire
from megatron_tropd.rollout.engines.keeper import EngineKeeper

IDLE_SECONDS = 2.0
"""A server that was told to stop stays until nobody has asked it anything for so long."""
LONGEST_WAIT = 30.0
_POLL_SECONDS = 0.5
_HTTP_START_SECONDS = 30.0


class Busy(RuntimeError):
    """The server has another batch."""


class BatchSlot:
    """The one batch a server has: HTTP threads put it there and ask for it, the engine's takes it.

    What became of it is kept until another one comes.
    """

    def __init__(self) -> None:
        """Nothing to do yet."""
        self._changed = threading.Condition()
        self._batch: wire.RequestBatch | None = None
        self._taken = False
        self._outcome: wire.BatchSamples | Exception | None = None
        self._closed = False
        self._asking = 0
        self._last_asked = time.monotonic()

    @property
    def batch_id(self) -> str | None:
        """The batch that is here, finished or not."""
        batch = self._batch
        return batch.id if batch else None

    def idle_seconds(self) -> float:
        """Since somebody asked for anything; 0 while somebody waits."""
        with self._changed:
            return 0.0 if self._asking else time.monotonic() - self._last_asked

    def put(self, batch: wire.RequestBatch) -> None:
        """Accept a batch; nothing happens if it is here already and has not failed.

        Raises:
            Busy: another one is not finished.
        """
        with self._changed:
            self._last_asked = time.monotonic()
            failed = isinstance(self._outcome, Exception)
            if self.batch_id == batch.id and not failed:
                return
            if self._batch is not None and self._outcome is None:
                raise Busy(f"{self._batch.id} is not finished")
            self._batch, self._taken, self._outcome = batch, False, None
            self._changed.notify_all()

    def take(self) -> wire.RequestBatch | None:
        """The next batch for the engine; None when the server ends."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._batch is not None and not self._taken)
            )
            self._taken = True
            return None if self._closed else self._batch

    def finish(self, outcome: wire.BatchSamples | Exception) -> None:
        """Say what became of the batch taken last."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()

    def outcome(self, batch_id: str, wait: float) -> wire.BatchSamples | Exception | None:
        """What became of a batch; None: not finished after ``wait`` seconds.

        Raises:
            KeyError: it is not here.
        """
        with self._changed:
            self._asking += 1
            try:
                self._changed.wait_for(
                    lambda: self._closed or self.batch_id != batch_id or self._outcome is not None,
                    wait,
                )
                if self.batch_id != batch_id:
                    raise KeyError(batch_id)
                return self._outcome
            finally:
                self._asking -= 1
                self._last_asked = time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the server lives."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def close(self) -> None:
        """Wake everybody: the server ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def make_app(
    slot: BatchSlot, keeper: EngineKeeper, *, token: str, about: dict[str, Any]
) -> FastAPI:
    """The HTTP side.

    Args:
        slot: where jobs go.
        keeper: asked for the engine's state.
        token: what a client must show.
        about: constant part of /status.
    """
    app = FastAPI(openapi_url=None)

    def check_token(request: Request) -> None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(shown.encode(), token.encode()):
            raise HTTPException(401, "Expected the job's token as 'Authorization: Bearer TOKEN'.")

    private = [Depends(check_token)]

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"state": keeper.state}

    @app.get("/status", dependencies=private)
    def status() -> dict[str, Any]:
        return about | {
            "state": keeper.state,
            "weights": asdict(keeper.weights) if keeper.weights else None,
            "batch": slot.batch_id,
            "engine_pid": keeper.engine_pid,
            "engine_restarts": keeper.restarts,
            "last_error": keeper.last_error,
        }

    @app.post("/batches", dependencies=private)
    async def put_batch(request: Request) -> Response:
        try:
            slot.put(wire.decode(await _body(request), wire.RequestBatch))
        except InputError as error:
            return _refusal(400, str(error))
        except Busy as error:
            return _refusal(409, str(error))
        return Response(status_code=202)

    @app.get("/batches/{batch_id}", dependencies=private)
    def get_outcome(batch_id: str, wait: float = 0.0) -> Response:
        try:
            outcome = slot.outcome(batch_id, min(max(wait, 0.0), LONGEST_WAIT))
        except KeyError:
            return _refusal(404, f"{batch_id} is not here; send it again")
        if outcome is None:
            return Response(status_code=202)
        if isinstance(outcome, InputError):
            return _refusal(400, str(outcome))
        if isinstance(outcome, Exception):
            return _refusal(500, str(outcome))
        return Response(wire.encode(outcome), media_type=wire.MEDIA_TYPE)

    return app


async def _body(request: Request) -> bytes:
    """The body of a request, read no further than the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > wire.MAX_BODY_BYTES:
            raise HTTPException(413, f"Expected at most {wire.MAX_BODY_BYTES} bytes.")
    return bytes(body)


def _refusal(code: int, reason: str) -> JSONResponse:
    return JSONResponse({"detail": reason}, status_code=code)


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens and where it says so."""

    folder: Path
    """The run's ``servers`` folder."""
    number: int
    host: str
    port: int
    """0: any free one."""
    token: str | None
    """The job's; None: one of its own, which only the owner of the run folder can read."""


class RolloutServer:
    """HTTP, engine and announcement of one server; :meth:`run` is its life."""

    def __init__(
        self,
        address: ServerAddress,
        make_keeper: Callable[[Callable[[float], object]], EngineKeeper],
        *,
        settings: str,
        pid: int,
    ) -> None:
        """Bind the address; nothing runs yet.

        Args:
            make_keeper: makes the engine's keeper, given how to sleep.
            settings: fingerprint of what samples depend on.

        Raises:
            ConfigError: the address cannot be bound, or it is not loopback and there is no token.
        """
        check_address(address)
        try:
            self._socket = socket.create_server((address.host, address.port))
        except OSError as error:
            raise ConfigError(
                f"A server cannot listen on {address.host}:{address.port}: {error}. Choose another "
                "--host or --port (0: any free one)."
            ) from None
        token = address.token or secrets.token_urlsafe(32)
        self._folder = address.folder
        self._announcement = wire.Announcement(
            number=address.number,
            host=address.host,
            port=self._socket.getsockname()[1],
            pid=pid,
            settings=settings,
            token=None if address.token else token,
        )
        self._slot = BatchSlot()
        self._keeper = make_keeper(self._slot.wait)
        about = asdict(replace(self._announcement, token=None))
        app = make_app(self._slot, self._keeper, token=token, about=about)
        self._http = HttpServer(
            HttpConfig(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="off")
        )
        self._fatal: BaseException | None = None

    def run(self, *, complete: Callable[[], bool], told_to_stop: Callable[[], int]) -> None:
        """Serve until the run is complete or somebody said stop.

        Args:
            complete: whether the run is.
            told_to_stop: how often a stop was asked for. Once: leave when nobody has asked
                anything for :data:`IDLE_SECONDS`, so that a step in progress can end. Twice: now.

        Raises:
            ConfigError, InputError: the model cannot be served, or another server has this number.
            TrainingError: the engine keeps dying.
        """
        http = threading.Thread(target=self._http.run, args=([self._socket],), daemon=True)
        engine = threading.Thread(target=self._run_engine, daemon=True)
        http.start()
        self._wait_for_http(http)
        try:
            self._announce()
            print(f"listening on {self._announcement.host}:{self._announcement.port}", flush=True)
            engine.start()
            while not complete() and not self._may_leave(told_to_stop()):
                self._check(http, engine)
                time.sleep(_POLL_SECONDS)
        except Exception as error:
            if self._is_announced():
                wire.leave_reason(self._folder, self._announcement.number, str(error))
            raise
        finally:
            self._leave(http)

    def _may_leave(self, stops: int) -> bool:
        return stops > 1 or (stops == 1 and self._slot.idle_seconds() > IDLE_SECONDS)

    def _check(self, http: threading.Thread, engine: threading.Thread) -> None:
        if self._fatal is not None:
            raise self._fatal
        if not http.is_alive() or not engine.is_alive():
            raise TrainingError(
                "A thread of the rollout server ended; its log says why.", kind="engine"
            )
        if not self._is_announced():
            raise ConfigError(
                f"{self._folder} announces another server {self._announcement.number}. Each server "
                "of a run needs a --number of its own; this one leaves."
            )

    def _announce(self) -> None:
        try:
            wire.announce(self._folder, self._announcement)
        except OSError as error:
            raise TrainingError(
                f"The rollout server cannot announce itself: {error}.", kind="disk"
            ) from None

    def _is_announced(self) -> bool:
        try:
            found = wire.read_announcement(self._folder, self._announcement.number)
        except OSError:  # a file system that hiccups is no other server
            return True
        if found is None:
            self._announce()
        return found in (None, self._announcement)

    def _wait_for_http(self, http: threading.Thread) -> None:
        deadline = time.monotonic() + _HTTP_START_SECONDS
        while not self._http.started:
            if not http.is_alive() or time.monotonic() > deadline:
                raise TrainingError(
                    "The HTTP side of the rollout server did not start.", kind="engine"
                )
            time.sleep(0.01)

    def _run_engine(self) -> None:
        try:
            self._keeper.start()
            while (batch := self._slot.take()) is not None:
                self._slot.finish(self._outcome_of(batch))
                if self._keeper.given_up:
                    raise TrainingError(
                        f"The engine keeps dying: {self._keeper.last_error}", kind="engine"
                    )
                self._keeper.start()
        except BaseException as error:
            self._fatal = error

    def _outcome_of(self, batch: wire.RequestBatch) -> wire.BatchSamples | Exception:
        try:
            samples = self._keeper.run(batch)
        except (InputError, TrainingError) as error:
            return error
        return wire.BatchSamples(batch.id, batch.weights, tuple(samples))

    def _leave(self, http: threading.Thread) -> None:
        if self._is_announced():
            path = wire.announcement_path(self._folder, self._announcement.number)
            path.unlink(missing_ok=True)
        self._slot.close()
        self._http.should_exit = True
        self._keeper.close()
        http.join(5.0)


def check_address(address: ServerAddress) -> None:
    """Refuse to be reachable from other machines without a secret.

    Raises:
        ConfigError: the host is unknown, all addresses at once, or not loopback without a token.
    """
    try:
        found = socket.gethostbyname(address.host)
    except OSError as error:
        raise ConfigError(
            f"--host {address.host} is no address of this machine: {error}."
        ) from None
    if found == "0.0.0.0":
        raise ConfigError(
            "--host must name one address, by which the trainer reaches the server; found all."
        )
    if not found.startswith("127.") and not address.token:
        raise ConfigError(
            f"--host {address.host} can be reached from other machines, so the environment "
            f"variable {wire.TOKEN_VARIABLE} must hold the job's secret, the same for servers and "
            "trainer. Set it, or listen on loopback (no --host)."
        )
