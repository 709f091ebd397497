"""Files of samples that survive interruption and are never mixed, for the tools that write them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.resumable import ResumableLines
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.tasks.exact_match import Sampler

_REQUESTS_PER_BATCH = 256


class WantedSample(NamedTuple):
    """One line of a file."""

    key: tuple[int, ...]
    """Values of the names that tell the lines apart."""
    request: SampleRequest
    record: Callable[[Sample], Mapping[str, Any]]
    """Makes the JSON object of the line, or what ``judge`` makes one of."""


def write_samples(
    engine: Callable[[], Sampler],
    wanted: Sequence[WantedSample],
    path: str | Path,
    *,
    header: Mapping[str, Any],
    key: Sequence[str],
    sampling: Sampling,
    judge: Callable[[list[Mapping[str, Any]]], Sequence[Mapping[str, Any]]] = list,
    engines: int = 1,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Sample the lines that a file does not have yet and append them.

    Every batch is on disk before the next one starts; a last line torn by a kill is dropped. The
    file is the same, byte for byte, wherever the writing was cut: a batch that is there in part is
    sampled again as a whole.

    Args:
        engine: makes an engine that serves the model; not called when nothing is missing.
        wanted: all lines, in the order of the file.
        header: its first line; its settings are compared when the file is continued.
        key: names of the integers that tell lines apart.
        judge: makes the JSON objects of a batch's new lines, each once.
        engines: how many share a batch, which has more lines then.
        resume: continue an existing file; False: an existing file is an error.
        progress: called with (lines in the file, lines wanted) after every batch.

    Raises:
        InputError: the file exists and may not be continued, was made with other settings, is
            broken before its last line, or is being written by another process.
    """
    with ResumableLines(path, header, key=key, resume=resume) as file:
        before, server = len(file.done), None
        for lines in batched(wanted, _REQUESTS_PER_BATCH * engines):
            if all(line.key in file.done for line in lines):
                continue
            server = server or engine()
            samples = server.generate([line.request for line in lines], sampling)
            records = [
                line.record(sample)
                for line, sample in zip(lines, samples, strict=True)
                if line.key not in file.done
            ]
            file.append(judge(records))
            progress(len(file.done), len(wanted))
        return len(file.done) - before


def model_identity(folder: str | Path, *, whole: bool = False) -> str:
    """Hash of what decides the samples of an HF folder: config.json and the weights.

    Args:
        whole: read the weight files whole; else only their sizes and first MiB, which tell other
            models apart, but not two steps of one training.

    Returns:
        16 hexadecimal digits.
    """
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in (folder / name for name in HFFolder(folder).files):
        with path.open("rb") as file:
            if whole:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                digest.update(file.read(2**20))
    return digest.hexdigest()[:16]
