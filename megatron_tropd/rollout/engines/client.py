"""The trainer's side of one rollout server: find it, ask whether it is ready, have a batch made."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from megatron_tropd.base.errors import InputError
from megatron_tropd.config.settings import Positive, Settings
from megatron_tropd.data.dispatch import BatchError, ServerError
from megatron_tropd.rollout.engines import wire

_CONNECT_SECONDS = 5.0
_LONGEST_WAIT = 5.0
"""A server holds a question for samples for so long before it says "not yet"."""


@dataclass(frozen=True)
class ClientSettings(Settings):
    """What a client knows before it meets a server."""

    folder: Path
    """The run's ``servers`` folder."""
    settings: str
    """Fingerprint a server must have."""
    answer_seconds: Positive = 30.0
    """A server that says nothing for so long is taken for dead."""


class ServerClient:
    """Talks to server ``number``, wherever it is announced now; used by one thread."""

    def __init__(self, known: ClientSettings, number: int) -> None:
        """Nothing is asked yet."""
        self.number = number
        self._known = known
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between trainer and servers

    def state(self) -> str:
        """What the server does: starting, loading, generating or ready.

        Raises:
            ServerError: it is not there or refuses us; says why.
        """
        answer = self._ask("GET", "/status")
        try:
            settings, state = (answer.json()[name] for name in ("settings", "state"))
        except (ValueError, KeyError, TypeError):
            raise ServerError(_alien(answer)) from None
        if settings != self._known.settings:
            raise ServerError(
                "was started with other settings of the models or the rollout than this run"
            )
        return str(state)

    def make(self, batch: wire.RequestBatch, *, wanted: Callable[[], bool]) -> wire.BatchSamples:
        """Have a batch made.

        Args:
            wanted: asked after every answer; false: nobody waits for the samples any more.

        Raises:
            ServerError: the server or its engine failed, or answered something else.
            InputError: the batch can be made by no server.
        """
        self._ask("POST", "/batches", data=wire.encode(batch))
        seconds = 2 * batch.seconds
        deadline = time.monotonic() + seconds
        wait = min(_LONGEST_WAIT, self._known.answer_seconds / 2)
        while wanted():
            answer = self._ask("GET", f"/batches/{batch.id}", params={"wait": wait})
            if answer.status_code == 200:
                return _checked(answer.content, batch)
            if time.monotonic() > deadline:
                raise ServerError(f"has had a batch for {seconds:g} s")
        raise ServerError("is not needed any more")

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        there = self._announcement()
        token = there.token or os.environ.get(wire.TOKEN_VARIABLE, "")
        try:
            answer = self._session.request(
                method,
                f"http://{there.host}:{there.port}{path}",
                headers={"Authorization": f"Bearer {token}", "Content-Type": wire.MEDIA_TYPE},
                timeout=(_CONNECT_SECONDS, self._known.answer_seconds),
                allow_redirects=False,
                **options,
            )
        except requests.Timeout:
            raise ServerError(
                f"({there.host}:{there.port}) did not answer for {self._known.answer_seconds:g} s"
            ) from None
        except requests.RequestException as error:
            raise ServerError(f"({there.host}:{there.port}) is not there: {error}") from None
        _check_answer(answer)
        return answer

    def _announcement(self) -> wire.Announcement:
        try:
            there = wire.read_announcement(self._known.folder, self.number)
        except InputError as error:
            raise ServerError(str(error)) from None
        if there is None:
            if reason := wire.read_reason(self._known.folder, self.number):
                raise ServerError(f"has ended: {reason}")
            path = wire.announcement_path(self._known.folder, self.number)
            raise ServerError(f"has not announced itself: {path} is missing")
        return there


def _check_answer(answer: requests.Response) -> None:
    code = answer.status_code
    if code in (200, 202):
        return
    if code == 500 and not answer.headers.get("content-type", "").startswith("application/json"):
        raise BatchError(f"answered 500: {answer.text[:500]}")
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        # Somebody else's port by now: its 400 says nothing about our batch.
        raise ServerError(_alien(answer)) from None
    if code in (400, 413):
        raise InputError(f"A rollout server refused its batch: {detail}")
    if code == 401:
        raise ServerError(
            f"does not accept the token: {wire.TOKEN_VARIABLE} differs between server and trainer"
        )
    raise (BatchError if code == 500 else ServerError)(f"answered {code}: {detail}")


def _alien(answer: requests.Response) -> str:
    return f"answered {answer.status_code} like no rollout server: {answer.text[:100]!r}"


def _checked(body: bytes, batch: wire.RequestBatch) -> wire.BatchSamples:
    try:
        made = wire.decode(body, wire.BatchSamples)
    except InputError as error:
        raise ServerError(f"sent something else: {error}") from None
    if made.weights != batch.weights or len(made.samples) != len(batch.requests):
        raise ServerError(
            f"sent {len(made.samples)} samples of weights {made.weights}, expected "
            f"{len(batch.requests)} of {batch.weights}"
        )
    return made
