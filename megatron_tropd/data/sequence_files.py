"""Token sequences as JSON lines: the one form of recorded rollouts and of a checkpoint's samples.

The first line is a header, every other line one sequence::

    {"format": "tropd-rollouts-2", ...}
    {"step": 0, "prompt": 4, "sample": 1, "ids": [1, 5, 7, 8, 2],
     "writers": [["context", 2], ["teacher", 1], ["student", 2]],
     "engine_logprobs": [null, null, null, -0.7, -0.1],
     "behaviour_logprobs": [null, null, null, -0.7, -0.1],
     "weights": [0, 0, 1, 1, 1], "versions": [-1, -1, -1, 0, 0], "finish": "stop", "fields": {}}

"tropd-rollouts-1" and the samples in checkpoints of version 0.1, which had no header, are read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import read_json_lines
from megatron_tropd.data.sequence import NO_VERSION, SampleKey, TokenSequence, Writer

FORMAT = "tropd-rollouts-2"
_RECORDED_BEFORE = "tropd-rollouts-1"
_WRITERS = {writer.name.lower(): writer for writer in Writer}
Reader = Callable[[Mapping[str, Any], str], TokenSequence]


def record_of(sequence: TokenSequence) -> dict[str, Any]:
    """Make the JSON object of a sequence; numbers are written exactly."""
    runs = groupby(sequence.writer_N.tolist())
    return {
        **sequence.key._asdict(),
        "ids": sequence.ids_N.tolist(),
        "writers": [[Writer(writer).name.lower(), len(list(run))] for writer, run in runs],
        "engine_logprobs": _exact(sequence.engine_logprobs_N),
        "behaviour_logprobs": _exact(sequence.behaviour_logprobs_N),
        "weights": _exact(sequence.weight_N),
        "versions": sequence.version_N.tolist(),
        "finish": sequence.finish,
        "fields": dict(sequence.fields),
    }


def dump_sequences(sequences: Sequence[TokenSequence]) -> bytes:
    """Write a header and one JSON object per sequence and line."""
    lines = [{"format": FORMAT}, *map(record_of, sequences)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read_sequences(path: str | Path) -> list[TokenSequence]:
    """Read what :func:`dump_sequences` wrote, or a checkpoint's samples of version 0.1.

    Raises:
        InputError: the file is missing, of another format, or a line is no sequence (with the line
            number).
    """
    found: list[TokenSequence] = []
    read: Reader | None = None
    for number, record in read_json_lines(path, "file of token sequences"):
        where = f"{path}, line {number}"
        if read is None:
            read = _of_version_0_1 if "prefix_ids" in record else reader_of(record, where)
            if "prefix_ids" not in record:
                continue
        found.append(read(record, where))
    return found


def reader_of(header: Mapping[str, Any], where: str) -> Reader:
    """Find who reads the records of a file with this header.

    Raises:
        InputError: the format is unknown.
    """
    known = {FORMAT: _of_record, _RECORDED_BEFORE: _of_recorded_before}
    if header.get("format") not in known:
        raise InputError(
            f"{where}: expected a header with format {FORMAT!r} (or {_RECORDED_BEFORE!r}), found "
            f"{header.get('format')!r}. Write the file with `tropd rollouts`."
        )
    return known[header["format"]]


def _exact(values_N: NDArray[np.float32]) -> list[float | None]:
    # The shortest decimals that float32 reads back.
    return [None if np.isnan(value) else float(str(value)) for value in values_N]


def _of_record(record: Mapping[str, Any], where: str) -> TokenSequence:
    ids_N = _ids(record, "ids", where)
    count = len(ids_N)

    def column(name: str) -> NDArray[np.float32]:
        return _numbers(record.get(name), count, name, where)

    return _checked(
        where,
        key=SampleKey(*(_integer(record, name, where) for name in SampleKey._fields)),
        ids_N=ids_N,
        writer_N=_writers(record, "writers", count, where),
        engine_logprobs_N=column("engine_logprobs"),
        behaviour_logprobs_N=column("behaviour_logprobs"),
        weight_N=column("weights"),
        version_N=column("versions").astype(np.int64),
        finish=str(record.get("finish")),
        fields=record.get("fields") or {},
    )


def _of_recorded_before(record: Mapping[str, Any], where: str) -> TokenSequence:
    """Read "tropd-rollouts-1": prompt and response apart, one column of log-probs."""
    prompt_P = _ids(record, "prompt_ids", where)
    response_R = _ids(record, "response_ids", where)
    length = len(response_R)
    writer_R = _writers(record, "segments", length, where)
    logprobs_R = _numbers(record.get("rollout_logprobs"), length, "rollout_logprobs", where)
    weights = record.get("loss_weights", [1.0] * length)
    weight_R = _numbers(weights, length, "loss_weights", where)
    student_R = writer_R == Writer.STUDENT

    def after_prompt(values_R: NDArray[Any], prompt: float) -> NDArray[Any]:
        return np.concatenate([np.full(len(prompt_P), prompt, values_R.dtype), values_R])

    logprobs_N = after_prompt(np.where(student_R, logprobs_R, np.float32(np.nan)), np.nan)
    return _checked(
        where,
        key=SampleKey(
            0, _integer(record, "prompt_index", where), _integer(record, "sample_index", where)
        ),
        ids_N=np.concatenate([prompt_P, response_R]),
        writer_N=after_prompt(writer_R, Writer.CONTEXT),
        engine_logprobs_N=logprobs_N,
        behaviour_logprobs_N=logprobs_N,
        weight_N=after_prompt(weight_R, 0),
        version_N=np.full(len(logprobs_N), NO_VERSION),
        finish=str(record.get("finish_reason")),
        fields={name: record[name] for name in ("weights", "seed") if name in record},
    )


def _of_version_0_1(record: Mapping[str, Any], where: str) -> TokenSequence:
    """Read a sample that a checkpoint of version 0.1 kept: a prefix apart from the response."""
    try:
        return TokenSequence.of_runs(
            SampleKey(record["step"], record["prompt_index"], record["sample_index"]),
            (Writer.CONTEXT, record["prompt_ids"]),
            (Writer.TEACHER, record["prefix_ids"]),
            (Writer.STUDENT, record["response_ids"]),
            logprobs=record["rollout_logprobs"],
            version=record["weights_version"],
            finish=record["finish_reason"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: expected a sample of a checkpoint of version 0.1, found {error!r}. Resume "
            "from an older checkpoint."
        ) from None


def _checked(where: str, **values: Any) -> TokenSequence:
    try:
        return TokenSequence(**values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _integer(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if type(value) is not int:
        raise InputError(f"{where}: {name} must be an integer, found {value!r}.")
    return value


def _ids(record: Mapping[str, Any], name: str, where: str) -> NDArray[np.int64]:
    ids = record.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise InputError(f"{where}: {name} must be a list of ids, not empty, found {ids!r:.60}.")
    return np.array(ids, np.int64)


def _writers(record: Mapping[str, Any], name: str, count: int, where: str) -> NDArray[np.int64]:
    runs = record.get(name)
    try:
        writer_N = np.repeat(
            [int(_WRITERS[writer]) for writer, _ in runs or ()],
            [length for _, length in runs or ()],
        )
    except (TypeError, ValueError, KeyError):
        writer_N = np.empty(0)
    if not len(writer_N):
        raise InputError(
            f'{where}: {name} must be a list like [["teacher", 3], ["student", 9]], found '
            f"{runs!r:.60}."
        )
    if len(writer_N) != count:
        raise InputError(f"{where}: {name} cover {len(writer_N)} tokens, expected {count}.")
    return writer_N


def _numbers(values: Any, count: int, name: str, where: str) -> NDArray[np.float32]:
    """[N] float32, nan for null."""
    good = isinstance(values, list) and all(
        value is None or type(value) in (int, float) for value in values
    )
    if not good:
        raise InputError(f"{where}: {name} must be a list of numbers, found {values!r:.60}.")
    if len(values) != count:
        raise InputError(
            f"{where}: expected one of {name} per token, found {len(values)} for {count} tokens."
        )
    return np.array(values, np.float32)
