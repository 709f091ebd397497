"""What trainer and rollout servers tell each other, as msgpack; and the files they meet by.

Everything that arrives is checked against the types here, and nothing in it can name a file or run
code: a request carries token ids and numbers.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.weights.versions import WeightsName

TOKEN_VARIABLE = "TROPD_SERVER_TOKEN"
"""Environment variable with the secret that the servers of a job and its trainer share."""
MEDIA_TYPE = "application/msgpack"
MAX_BODY_BYTES = 256 * 2**20
"""Largest message either side takes."""

Model = Literal["student", "teacher"]


@dataclass(frozen=True)
class RequestBatch:
    """Requests that are continued together, alone in one engine: its samples depend on nothing
    else, whichever server makes them.
    """

    id: str
    """Unique; sending the same batch again is harmless."""
    model: Model
    weights: WeightsName | None
    """The student's; None: the weights of the model's folder."""
    requests: tuple[SampleRequest, ...]
    sampling: Sampling
    seconds: float
    """After so long a server ends its engine and reports the batch as failed."""


@dataclass(frozen=True)
class BatchSamples:
    """What became of a batch."""

    id: str
    weights: WeightsName | None
    """What made the samples."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Announcement:
    """How to reach a server; the content of ``servers/server_000.json``."""

    number: int
    host: str
    port: int
    pid: int
    settings: str
    """Fingerprint of the settings that samples depend on."""
    token: str | None = None
    """Only of a server on loopback without a job's token; the file is the owner's alone."""


def encode(message: RequestBatch | BatchSamples) -> bytes:
    """A message as msgpack; floats exactly."""
    return msgspec.msgpack.encode(message)


def decode[T](body: bytes, kind: type[T]) -> T:
    """Inverse of :func:`encode`.

    Raises:
        InputError: the body is not such a message; says where and what was expected.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise InputError(f"Expected a msgpack {kind.__name__}: {error}.") from None


def announcement_path(folder: Path, number: int) -> Path:
    """Where server ``number`` announces itself."""
    return folder / f"server_{number:03d}.json"


def announce(folder: Path, announcement: Announcement) -> None:
    """Write the file by which the trainer finds a server; it appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = announcement_path(folder, announcement.number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(announcement), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _reason_path(folder, announcement.number).unlink(missing_ok=True)


def leave_reason(folder: Path, number: int, reason: str) -> None:
    """Say why server ``number`` ended, for the trainer's message."""
    with contextlib.suppress(OSError):
        _reason_path(folder, number).write_text(reason + "\n")


def read_reason(folder: Path, number: int) -> str | None:
    """Why server ``number`` ended last; None: it did not say."""
    with contextlib.suppress(OSError):
        return _reason_path(folder, number).read_text().strip()
    return None


def _reason_path(folder: Path, number: int) -> Path:
    return announcement_path(folder, number).with_suffix(".error")


def read_announcement(folder: Path, number: int) -> Announcement | None:
    """What server ``number`` announced; None: nothing yet.

    Raises:
        InputError: the file is not an announcement.
    """
    path = announcement_path(folder, number)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(text, type=Announcement)
    except msgspec.MsgspecError as error:
        raise InputError(f"{path} does not say how to reach a server: {error}.") from None


def served_settings(config: Config) -> str:
    """Fingerprint of the settings on which a server's samples depend, as 16 hexadecimal digits."""
    tables = config_to_dict(config)
    settings = {name: dict(tables[name]) for name in ("model", "rollout", "evaluation")}
    settings |= {"tasks": tables["tasks"]} if config.tasks else {}
    # Not of the samples; the trainer fills the date in, and servers are asked for token ids.
    for name in ("mode", "weight_transport", "max_engine_gap", "chat_template_date"):
        del settings["rollout"][name]
    for name in ("teacher", "before", "after", "keep_answers", "teacher_results"):
        del settings["evaluation"][name]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
