"""The files of a teacher's cached signals: shards, each whole or absent, found by sequence.

A folder holds ``cache.json``, which says whose signals they are and of what, and shards of whole
sequences (safetensors). A shard has a row for each scored token, sequence after sequence::

    ids                [M] int32, the tokens themselves
    sampled_logprobs   [M] float32, log p of them
    logsumexp          [M] float32, of the teacher's logits
    topk_ids           [M, K] int32, most likely first
    topk_logprobs      [M, K] float32 or bfloat16, over the whole vocabulary
    reference_logprobs [M] float32, if there is a reference

and a row for each sequence: ``keys`` [n, 3] (round, prompt, sample), ``lengths`` [n] and ``scored``
[n] (tokens, scored tokens), ``digests`` [n, 16] of ids and of which are scored, ``checksums`` [n]
(CRC-32 of the sequence's rows).
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import patiently, write_json
from megatron_tropd.base.text_files import read_json_object
from megatron_tropd.convert.safetensors_file import SafetensorsFile
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.teacher.cached.digest import num_scored, scored_tokens, sequence_digest

FORMAT = "tropd-teacher-1"
HEADER = "cache.json"
_OF_SEQUENCES = ("keys", "lengths", "scored", "digests", "checksums")
_OPEN_FILES = 64
"""Shards whose files stay open."""
_AGAIN = "Score again into another teacher.cache"


@dataclass(frozen=True)
class CacheHeader:
    """Whose signals a folder holds, and of what."""

    teacher: str
    """Digest of the model."""
    reference: str | None
    """Digest of what it is measured against; None: the losses that read one cannot use it."""
    tokenizer: str
    """Fingerprint (``data.tokenizers``)."""
    vocab_size: int
    """Ids over which log-probs are normalised."""
    model_dtype: str
    """In which the teacher computed."""
    top_k: int
    dtype: str
    """Of the top-k log-probs."""
    rollouts: str
    """Digest of the sequences in their order."""
    sequences: int
    tokens: int
    """Scored ones."""
    shards: int


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"signals-{number:05d}.safetensors"


def shards_of(sequences: Sequence[TokenSequence], most_tokens: int) -> list[range]:
    """Cut a list into shards of whole sequences, at most so many scored tokens each if they can."""
    found, start, tokens = [], 0, 0
    for index, sequence in enumerate(sequences):
        count = num_scored([sequence])
        if index > start and tokens + count > most_tokens:
            found.append(range(start, index))
            start, tokens = index, 0
        tokens += count
    return [*found, range(start, len(sequences))] if sequences else found


def check_header(folder: Path, header: CacheHeader) -> None:
    """Compare the header of a folder that is to be continued; nothing is written.

    Raises:
        InputError: it holds other scores; what differs is named.
    """
    if not (folder / HEADER).exists():
        return
    found, wanted = asdict(read_header(folder)), asdict(header)
    differing = [
        f"{name}: {found[name]!r} there, {wanted[name]!r} asked for"
        for name in wanted
        if found[name] != wanted[name]
    ]
    if differing:
        raise InputError(
            f"{folder} holds scores that were made otherwise ({'; '.join(differing)}). Name "
            "another teacher.cache, or use the same settings to continue it."
        )


def write_header(folder: Path, header: CacheHeader) -> None:
    """Write what the shards will be; drop what a killed writer left half-written."""
    for left in folder.glob(".signals-*.tmp"):
        left.unlink()
    write_json(folder / HEADER, {"format": FORMAT, **asdict(header)})


def read_header(folder: Path) -> CacheHeader:
    """Read whose signals a folder holds.

    Raises:
        InputError: it holds none.
    """
    path = folder / HEADER
    if not path.exists():
        raise InputError(
            f"teacher.cache = {str(folder)!r} holds no {HEADER}. Make it with `tropd score` and "
            "the same config."
        )
    content = read_json_object(path)
    names = {f.name for f in fields(CacheHeader)}
    if content.get("format") != FORMAT or not names <= content.keys():
        raise InputError(
            f"{path}: expected the format {FORMAT!r} with {', '.join(sorted(names))}, found "
            f"{content.get('format')!r}. {_AGAIN}."
        )
    return CacheHeader(**{name: content[name] for name in names})


def write_shard(path: Path, sequences: Sequence[TokenSequence], columns: dict[str, Tensor]) -> None:
    """Write the scores of some sequences, on disk and whole when the file has its name.

    Args:
        path: of the shard.
        sequences: in their order.
        columns: name -> a row for each of their scored tokens.

    Raises:
        TrainingError: it cannot be written (kind "disk").
    """
    masks = [scored_tokens(sequence) for sequence in sequences]
    counts = [int(mask.sum()) for mask in masks]
    ids = np.concatenate([s.ids_N[mask] for s, mask in zip(sequences, masks, strict=True)])
    columns = {**columns, "ids": torch.from_numpy(ids).int()}
    columns["topk_ids"] = columns["topk_ids"].int()
    rows = list(pairwise(accumulate(counts, initial=0)))
    digests = np.frombuffer(b"".join(map(sequence_digest, sequences)), np.uint8)
    tensors = {
        **columns,
        "keys": torch.tensor([s.key for s in sequences]),
        "lengths": torch.tensor([len(s) for s in sequences]),
        "scored": torch.tensor(counts),
        "digests": torch.from_numpy(digests.copy()).view(len(sequences), -1),
        "checksums": torch.tensor([_checksum(columns, start, stop) for start, stop in rows]),
    }
    content = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    )
    temporary = path.with_name(f".{path.name}.tmp")

    def replace() -> None:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    patiently(replace, path)


def _checksum(columns: Mapping[str, Tensor], start: int, stop: int) -> int:
    """CRC-32 of some rows of all columns, in the order of their names."""
    total = 0
    for name in sorted(columns):
        rows = columns[name][start:stop].contiguous()
        total = zlib.crc32(rows.view(torch.uint8).numpy(), total)
    return total


@dataclass(frozen=True)
class _Place:
    """Where a sequence lies."""

    shard: int
    start: int
    stop: int
    checksum: int


class TeacherCache:
    """Finds and reads the signals of sequences; opening it reads the index of every shard."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that ``tropd score`` has completed.

        Raises:
            InputError: it holds no cache, or not all of it; a shard is damaged.
        """
        self.folder, self.header = folder, read_header(folder)
        missing = [
            path
            for number in range(self.header.shards)
            if not (path := shard_path(folder, number)).exists()
        ]
        if missing:
            raise InputError(
                f"{folder} is not complete: {len(missing)} of {self.header.shards} shards are "
                f"missing, first {missing[0].name}. `tropd score` with the same config goes on."
            )
        self._open = lru_cache(_OPEN_FILES)(self._opened)
        self._places: dict[bytes, _Place] = {}
        for number in range(self.header.shards):
            self._index(number)

    def describe(self) -> str:
        """Say in words what there is."""
        held = self.header
        return (
            f"cached in {self.folder}, {held.sequences} sequences with {held.tokens} scored "
            f"tokens, k = {held.top_k}, {held.dtype}"
        )

    def check_top_k(self, needed: int, method: str) -> None:
        """Refuse a loss that needs more of each token than there is.

        Raises:
            ConfigError: it does.
        """
        if needed > self.header.top_k:
            raise ConfigError(
                f"loss.method = {method!r} needs the teacher's {needed} most likely ids, found "
                f"{self.header.top_k} in {self.folder}. Lower loss.top_k, or set "
                f"teacher.cache_top_k = {needed} and score again into another teacher.cache."
            )

    def check_models(self, **expected: Any) -> None:
        """Refuse the scores of another model, reference, tokenizer or vocabulary.

        Args:
            expected: fields of :class:`CacheHeader`; what is None is not compared.

        Raises:
            InputError: one differs; it is named.
        """
        for name, value in expected.items():
            found = getattr(self.header, name)
            if value is not None and value != found:
                raise InputError(
                    f"{self.folder} holds scores of another {name.replace('_', ' ')}: expected "
                    f"{value!r}, found {found!r}. Name the cache of this one in teacher.cache, or "
                    "score again (`tropd score`) into another folder."
                )

    def find(self, sequence: TokenSequence) -> _Place:
        """Find the scores of a sequence.

        Raises:
            InputError: there are none.
        """
        place = self._places.get(sequence_digest(sequence))
        if place is None:
            key = sequence.key
            raise InputError(
                f"{self.folder} has no scores of prompt {key.prompt}, sample {key.sample} "
                f"({len(sequence)} tokens): it was made of other rollouts. {_AGAIN}, or name the "
                "recorded rollouts that it is of."
            )
        return place

    def read(self, sequence: TokenSequence) -> dict[str, Tensor]:
        """Read the signals of a sequence: name of a column -> a row for each scored token.

        Raises:
            InputError: there are none, or they are damaged.
        """
        place = self.find(sequence)
        file = self._open(place.shard)
        names = sorted(file.tensors.keys() - set(_OF_SEQUENCES))
        columns = {name: file.read(name, place.start, place.stop) for name in names}
        if _checksum(columns, 0, place.stop - place.start) != place.checksum:
            key = sequence.key
            raise InputError(
                f"{file.path} is damaged: the scores of prompt {key.prompt}, sample {key.sample} "
                "do not have their checksum. Remove the file; `tropd score` writes it again."
            )
        return columns

    def _opened(self, number: int) -> SafetensorsFile:
        path = shard_path(self.folder, number)
        try:
            return SafetensorsFile(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}). Remove it; `tropd score` writes it again."
            ) from None

    def _index(self, number: int) -> None:
        file = self._open(number)
        index = {name: file.read(name) for name in ("digests", "scored", "checksums")}
        ends = index["scored"].cumsum(0).tolist()
        for digest, stop, count, checksum in zip(
            index["digests"].numpy(),
            ends,
            index["scored"].tolist(),
            index["checksums"].tolist(),
            strict=True,
        ):
            self._places[digest.tobytes()] = _Place(number, stop - count, stop, checksum)
