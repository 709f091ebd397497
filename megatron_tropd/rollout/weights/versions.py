"""Versions of the student's weights in the run folder, for servers."""

import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.data.collective import run_everywhere
from megatron_tropd.rollout.weights.interface import NamedTensor
from megatron_tropd.rollout.weights.mailbox import write_buckets

_WRITER = "writer.txt"
VISIBLE_SECONDS = 60.0
"""After so long a network file system shows everyone what one machine wrote."""


@dataclass(frozen=True)
class WeightsName:
    """Which weights: the optimizer steps they have seen and the process that wrote them.

    A run that resumes makes a version again. It should be the same to the last bit, but no server
    has to rely on it: another writer is another name.
    """

    version: int
    """Optimizer steps."""
    writer: str
    """Unique to each start of the trainer."""

    def __str__(self) -> str:
        return f"weights after step {self.version}"


class WeightVersions:
    """Versions of the weights in a folder that trainer and servers share.

    ``version_000123/`` is complete when it has that name; while it is written it starts with a dot.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: made by the first write."""
        self.folder = folder

    def path(self, version: int) -> Path:
        """Where a version lies, or would."""
        return self.folder / f"version_{version:06d}"

    def write(self, name: WeightsName, tensors: Iterable[NamedTensor]) -> None:
        """Write a version; one of the same number is replaced.

        Args:
            name: the version and its writer.
            tensors: HF names and tensors on any device; always exhausted.

        Raises:
            TrainingError: the folder cannot be written, or there is no room.
        """
        final = self.path(name.version)
        unfinished = final.with_name(f".{final.name}.{name.writer}")
        tensors = iter(tensors)
        try:
            unfinished.mkdir(parents=True)
            write_buckets(unfinished, tensors)
            (unfinished / _WRITER).write_text(name.writer)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        except (OSError, TrainingError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise TrainingError(
                f"The weights after step {name.version} could not be handed to the rollout "
                f"servers: {error}",
                kind="disk",
            ) from None
        finally:
            for _ in tensors:
                pass

    def find(self, name: WeightsName) -> Path:
        """The folder of a complete version.

        Raises:
            TrainingError: it is not there, or another process wrote it.
        """
        folder = self.path(name.version)
        try:
            writer = (folder / _WRITER).read_text()
        except OSError as error:
            raise TrainingError(
                f"Weights {folder} are not there: {error}. Trainer and servers must see the same "
                "run folder.",
                kind="disk",
            ) from None
        if writer != name.writer:
            raise TrainingError(
                f"Weights {folder} are of the trainer {writer}, expected {name.writer}: another "
                "command writes into this run folder."
            )
        return folder

    def prune(self, oldest: int, newest: int) -> None:
        """Remove every version outside ``oldest``..``newest``, and what was left unfinished."""
        kept = {self.path(version) for version in range(oldest, newest + 1)}
        for folder in self.folder.glob("*version_*"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class VersionChannel:
    """The way of weights to servers: rank 0 writes them, a server reads what it is asked for."""

    receivers = (0,)

    def __init__(self, versions: WeightVersions, *, is_writer: bool) -> None:
        """Nothing is written yet."""
        self._versions = versions
        self._is_writer = is_writer
        self._writer = uuid.uuid4().hex[:8]
        self.name: WeightsName | None = None
        """Of the weights sent last."""
        self.needed: WeightsName | None = None
        """Of weights that samples are still made with: they stay."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights sent last have seen."""
        return self.name.version if self.name else 0

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Write the weights; a server loads them when it is first asked for samples of them.

        Collectives: those of ``tensors``, a gather of the outcome.
        """
        name = WeightsName(version, self._writer)
        run_everywhere(lambda: self._write(name, tensors))
        self.name = name

    def close(self) -> None:
        """Remove what was written."""
        if self.name is not None and self._is_writer:
            self._versions.clear()

    def _write(self, name: WeightsName, tensors: Iterable[NamedTensor]) -> None:
        tensors = iter(tensors)
        try:
            if self._is_writer:
                oldest = self.needed.version if self.needed else name.version
                self._versions.prune(oldest, name.version)
                self._versions.write(name, tensors)
        finally:
            for _ in tensors:  # making them is collective, also where they are not needed
                pass
