"""Writing teacher responses beforehand: a file that survives interruption and is never mixed.

The format is that of :mod:`megatron_tropd.data.responses`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
from megatron_tropd.data.types import Prompt
from megatron_tropd.errors import InputError
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.rollout.types import Sample, SampleRequest, Sampling
from megatron_tropd.tasks.exact_match import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUESTS_PER_BATCH = 256


def write_responses(
    engine: Callable[[], Engine],
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    samples: int = 1,
    seed: int = 1234,
    teacher: str = "",
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Sample the responses a file does not have yet and append them.

    Every batch is on disk before the next one starts; a last line torn by a kill is dropped. A
    response depends on the seed, its prompt and its sample number, not on where a run was cut.

    Args:
        engine: makes an engine that serves the teacher; not called when nothing is missing.
        prompts: what to continue.
        tokenizer: the teacher's.
        path: the file; made if absent.
        sampling: temperature, top-p and stop ids.
        max_new_tokens: longest response.
        samples: responses per prompt.
        seed: keys the samples.
        teacher: identity of the teacher's weights (:func:`model_identity`).
        resume: continue an existing file; False: an existing file is an error.
        progress: called with (responses in the file, responses wanted) after every batch.

    Returns:
        How many responses were added.

    Raises:
        InputError: the file exists and may not be continued, was made with other settings, is
            broken before its last line, or is being written by another process.
    """
    settings = {
        "teacher": teacher,
        "samples": samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    path = Path(path)
    if path.exists() and not resume:
        raise InputError(f"{path} exists. Continue it (resume), remove it, or name another file.")
    with _open_alone(path) as file:
        done = _take_up(file, path, header_record(tokenizer, settings))
        wanted = [(p, s) for p in prompts for s in range(samples)]
        missing = [(p, s) for p, s in wanted if (p.index, s) not in done]
        if not missing:
            return 0
        server = engine()
        for batch in batched(missing, _REQUESTS_PER_BATCH):
            requests = [
                SampleRequest(
                    prompt.token_ids,
                    max_new_tokens,
                    keyed_seed(seed, Purpose.TEACHER_RESPONSE, prompt.index, sample),
                )
                for prompt, sample in batch
            ]
            written = server.generate(requests, sampling)
            for (prompt, number), request, sample in zip(batch, requests, written, strict=True):
                _append(file, _record(prompt, number, sample, tokenizer, request.seed))
            _flush(file)
            done |= {(prompt.index, number) for prompt, number in batch}
            progress(len(done), len(wanted))
    return len(missing)


def model_identity(folder: str | Path) -> str:
    """Cheap identity of an HF folder: hash of config.json and of the weight files' beginnings.

    Args:
        folder: HF folder.

    Returns:
        16 hexadecimal digits. Differs for another architecture or other first tensors; does not
        read whole weights.
    """
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def _record(
    prompt: Prompt, number: int, sample: Sample, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> dict[str, Any]:
    response = TeacherResponse(prompt.index, number, sample.token_ids, sample.finish_reason)
    text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
    return response_record(prompt, response, text=text, seed=seed)


@contextmanager
def _open_alone(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another process is writing {path}. Wait for it or name another file."
            ) from None
        yield file


def _take_up(file: IO[bytes], path: Path, header: dict[str, Any]) -> set[tuple[int, int]]:
    """Drop a torn last line, check the header (or write it); the responses already there."""
    file.seek(0)
    lines = file.read().split(b"\n")
    if lines[-1]:
        file.truncate(file.tell() - len(lines[-1]))
    complete = lines[:-1]
    if not complete:
        _append(file, header)
        _flush(file)
        return set()
    _check_header(_parse(complete[0], path, 1), header, path)
    records = [_parse(line, path, number) for number, line in enumerate(complete[1:], start=2)]
    return {(record.get("prompt_index", -1), record.get("sample", -1)) for record in records}


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{path}, line {number}: expected a JSON object, found {error}. Cut the file off "
            "before that line to continue it."
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number}: expected a JSON object, found {value!r:.60}.")
    return value


def _check_header(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    mine = {**expected, **expected["settings"]}
    theirs = {**found, **(found.get("settings") or {})}
    differing = [
        f"{name}: {theirs.get(name)!r} in the file, {mine[name]!r} asked for"
        for name in mine
        if name != "settings" and theirs.get(name) != mine[name]
    ]
    if differing:
        raise InputError(
            f"{path} was made with other settings ({'; '.join(differing)}). Name another file, or "
            "use the same settings to continue it."
        )


def _append(file: IO[bytes], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
