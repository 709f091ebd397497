"""One address of ``vllm serve``: questions, answers, and what each error of it means.

Scores are asked of ``/v1/completions`` (``prompt_logprobs``), which every ``vllm serve`` has.
``/inference/v1/generate`` could also score given ids (``prompt_logprob_token_ids``: the student's
top-k); in vLLM 0.32 that takes ``--enable-scale-out`` and the V2 model runner, which no CPU has.

Shape suffixes: M = scored tokens, K = top-k, N = tokens of a sequence.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from megatron_tropd.base.environment import variable
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.data.dispatch import BatchError, ServerError

TOKEN_VARIABLE = "TROPD_TEACHER_TOKEN"
"""Environment variable with the key of ``vllm serve --api-key``."""
SPARE_IDS = 16
"""Further ids asked for if the teacher has columns that the student lacks: those are left out."""
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What a server would else take from the teacher's generation_config.json."""
_CONNECT_SECONDS = 5.0
_OVERFLOW = (
    "are not all numbers: it overflows, or its weights are damaged. Try `--dtype float32`, or "
    "another copy of the weights."
)
_PATHS = {"models": "/v1/models", "completions": "/v1/completions", "tokenize": "/tokenize"}


class Gone(ServerError):
    """Nobody answers at the address: whoever does next may be another."""


@dataclass(frozen=True)
class Wanted:
    """What a teacher's servers are asked for."""

    top_k: int
    """The teacher's most likely ids of each token."""
    vocab_size: int
    """Columns that are real in all models; ids above are left out."""
    teacher_vocab: int
    """Columns of the teacher."""
    timeout_seconds: float
    """A request without an answer for so long is given up."""

    @property
    def asked(self) -> int:
        """Ids that are asked for."""
        return self.top_k + min(SPARE_IDS, self.teacher_vocab - self.vocab_size)


@dataclass(frozen=True)
class Scored:
    """What the teacher says of the scored tokens of a sequence; float32, nats."""

    sampled_M: NDArray[np.float32]
    """Log p of the tokens themselves."""
    ids_MK: NDArray[np.int32]
    """Most likely first; of equal ones the lower."""
    logprobs_MK: NDArray[np.float32]


@dataclass
class Server:
    """An address, and what is known of who answers there; shared by the threads that ask."""

    number: int
    address: str
    model: str = ""
    """The name under which it serves the teacher."""
    fingerprint: str | None = None
    """Of its settings, in every answer: another one is another server."""
    known: bool = False
    """Whether it was ever found to be the teacher, with all that is checked."""
    checked: bool = False
    """Whether it is the teacher, as far as one knows: not after it was gone."""
    losses: int = 0
    """How often it was gone."""
    checking: threading.Lock = field(default_factory=threading.Lock)
    """Held by the one thread that finds out who is there."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of what is known; never held for long."""

    def lost(self, error: ServerError) -> None:
        """Take note that it failed: it is checked before it is asked again."""
        with self.lock:
            self.checked = False
            if isinstance(error, Gone):
                self.known = False
                self.losses += 1

    def __str__(self) -> str:
        """As messages call it."""
        return f"Teacher server {self.number} ({self.address})"


class Connection:
    """Asks one server; used by one thread."""

    def __init__(self, server: Server, wanted: Wanted) -> None:
        """Nothing is asked yet."""
        self.server, self.wanted = server, wanted
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between trainer and servers

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def models(self) -> list[dict[str, Any]]:
        """What it serves: id, root and max_model_len of each model.

        Raises:
            ServerError: it is not there, or no such server.
            ConfigError: it refuses us.
        """
        answer = self._ask("models", None)
        return self._read(answer, lambda found: list(found["data"]))

    def tokenize(self, text: str) -> list[int] | None:
        """The ids that it makes of a text, special tokens in it included; None: it cannot."""
        body = {"model": self.server.model, "prompt": text, "add_special_tokens": False}
        answer = self._ask("tokenize", body, refusable=True)
        if not answer.ok:
            return None
        return self._read(answer, lambda found: [int(i) for i in found["tokens"]])

    def refuses_id(self, token_id: int) -> bool:
        """Whether an id is outside of its vocabulary."""
        body = {"prompt": [0, 0], "max_tokens": 1, "logprobs": 1, "logprob_token_ids": [token_id]}
        answer = self._ask("completions", {"model": self.server.model, **body}, refusable=True)
        if not answer.ok and "out-of-vocab" not in answer.text:
            raise InputError(f"{self.server} refused a request: {_detail(answer)}")
        return not answer.ok

    def score(
        self,
        ids_N: Sequence[int],
        at: Sequence[int],
        sampling: Mapping[str, Any] = NEUTRAL,
        wanted: Wanted | None = None,
    ) -> tuple[Scored, str | None]:
        """Score tokens of a sequence.

        Args:
            ids_N: the sequence.
            at: the tokens that are wanted, not the first one.
            sampling: parameters that should change nothing.
            wanted: what else is asked for.

        Returns:
            The scores, and the fingerprint of who gave them.

        Raises:
            ServerError: the server failed.
            InputError: no server of this model could do it, or scores are no numbers.
        """
        wanted = wanted or self.wanted
        body = {
            "model": self.server.model,
            "prompt": list(ids_N),
            "prompt_logprobs": wanted.asked,
            "max_tokens": 1,
            "add_special_tokens": False,
            **sampling,
        }
        scored, fingerprint = self._read(
            self._ask("completions", body),
            lambda found: (
                _scored(found["choices"][0]["prompt_logprobs"], ids_N, at, wanted),
                found.get("system_fingerprint"),
            ),
        )
        if not all(np.isfinite(part).all() for part in (scored.sampled_M, scored.logprobs_MK)):
            raise InputError(f"{self.server}: the teacher's log-probs {_OVERFLOW}")
        return scored, fingerprint

    def _ask(
        self, what: str, body: Mapping[str, Any] | None, *, refusable: bool = False
    ) -> requests.Response:
        """An answer of code 200, or, if it is ``refusable``, one that says no."""
        address, seconds = self.server.address, self.wanted.timeout_seconds
        token = variable(TOKEN_VARIABLE)
        try:
            answer = self._session.request(
                "GET" if body is None else "POST",
                f"{address}{_PATHS[what]}",
                json=body,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=(_CONNECT_SECONDS, seconds),
                allow_redirects=False,
            )
        except requests.Timeout:
            raise ServerError(f"({address}) did not answer for {seconds:g} s") from None
        except requests.RequestException as error:
            raise Gone(f"({address}) is not there: {_reason(error)}") from None
        if not (refusable and answer.status_code in (400, 404, 422, 501)):
            self._check(answer)
        return answer

    def _check(self, answer: requests.Response) -> None:
        """Raise what an answer's code means."""
        code, address = answer.status_code, self.server.address
        if code == 200:
            return
        if code in (401, 403):
            found = "another" if variable(TOKEN_VARIABLE) else "none"
            raise ConfigError(
                f"{self.server} does not let us in ({code}): expected the key of its --api-key in "
                f"the environment variable {TOKEN_VARIABLE} of every rank, found {found}."
            )
        if code == 404 and "does not exist" in answer.text:
            raise ServerError(f"({address}) serves another model now: {_detail(answer)}")
        if code in (400, 413, 422):
            raise InputError(f"{self.server} refused a request: {_detail(answer)}{_advice(answer)}")
        kind = BatchError if code == 500 else ServerError
        raise kind(f"({address}) answered {code}: {_detail(answer)}")

    def _read[T](self, answer: requests.Response, take: Callable[[Any], T]) -> T:
        """Take something out of an answer, or say that it is of no such server."""
        try:
            return take(answer.json())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ServerError(
                f"({self.server.address}) answered like no `vllm serve`: {answer.text[:100]!r}"
            ) from None


def _reason(error: BaseException) -> str:
    """What the system said, without the libraries in between."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return type(error).__name__


def _detail(answer: requests.Response) -> str:
    """What a server says of its refusal."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return repr(answer.text[:200])


def _advice(answer: requests.Response) -> str:
    if "max allowed" in answer.text:
        return " Start it with a --max-logprobs of at least as many as were requested."
    if "context length" in answer.text:
        return " Start it with a larger --max-model-len."
    return ""


def _scored(
    told: Sequence[Mapping[str, Any] | None],
    ids_N: Sequence[int],
    at: Sequence[int],
    wanted: Wanted,
) -> Scored:
    """Put an answer in order: one entry for each token, of its id and the most likely ones.

    Log-probs are over the teacher's columns. What those that the student lacks take of it, as far
    as the answer shows, is taken out: they are then over the shared ones.
    """
    if len(told) != len(ids_N):
        raise ValueError(f"{len(told)} entries for {len(ids_N)} tokens")
    entries = [told[index] for index in at]
    width = wanted.asked + 1
    ids_MW = np.full((len(at), width), np.iinfo(np.int64).max)
    logprobs_MW = np.full((len(at), width), -np.inf)
    sampled_M = np.empty(len(at))
    for row, (index, entry) in enumerate(zip(at, entries, strict=True)):
        if entry is None:
            raise ValueError(f"no entry for token {index}")
        ids_MW[row, : len(entry)] = [int(token) for token in entry]
        logprobs_MW[row, : len(entry)] = [float(said["logprob"]) for said in entry.values()]
        sampled_M[row] = entry[str(ids_N[index])]["logprob"]
    alien_MW = (ids_MW >= wanted.vocab_size) & np.isfinite(logprobs_MW)
    shift_M = np.log1p(-np.exp(np.where(alien_MW, logprobs_MW, -np.inf)).sum(axis=1))
    logprobs_MW[alien_MW] = -np.inf
    order_MW = np.lexsort((ids_MW, -logprobs_MW), axis=-1)[:, : wanted.top_k]
    top_MK = np.take_along_axis(logprobs_MW, order_MW, axis=1)
    return Scored(
        (sampled_M - shift_M).astype(np.float32),
        np.take_along_axis(ids_MW, order_MW, axis=1).astype(np.int32),
        (top_MK - shift_M[:, None]).astype(np.float32),
    )
