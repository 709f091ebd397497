"""Where the teacher's signals come from.

A file or package here is a source (``teacher.placement``); its ``SOURCE`` makes one of a
:class:`TeacherStart`.
Another package's is named as "package.module:attribute".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import load_part
from megatron_tropd.config import Config
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import (
    ReferencedSignal,
    ReferencedTopKSignal,
    RoutedSignal,
    TeacherSignal,
    TopKSignal,
)

if TYPE_CHECKING:
    import torch

    from megatron_tropd.mcore.layout import Layout
    from megatron_tropd.mcore.student import Student


@dataclass(frozen=True)
class TeacherStart:
    """What a source is made of, on every rank."""

    config: Config
    folder: HFFolder | MegatronFolder
    """The teacher's model."""
    layout: "Layout"
    """This rank's place, and its process groups."""
    dtype: "torch.dtype"
    """Of the models."""
    padded_vocab_size: int
    """Columns of the output layers, over all tensor-parallel ranks."""
    vocab_size: int
    """Columns that are real in all models."""
    reference: HFFolder | MegatronFolder | None = None
    """The model that the teacher is measured against, if the loss reads it."""
    student: "Student | None" = None
    """Of the run; None: there is none, for `tropd score` scores."""
    longest: int = 0
    """Tokens of the longest sequence; 0: not known."""
    run_dir: Path | None = None
    """Folder of the run, where a later start may look; None: there is none."""


class TeacherSource(Protocol):
    """Scores the sequences of one step after the other; every method is collective."""

    signal: type[TeacherSignal]
    """What it gives. A loss that needs more is refused at the start."""

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Learn of the step's sequences, before they are packed; may start to score them.

        Args:
            step: 0-based.
            sequences: all of the step, the same on every rank.
        """

    def signals(self, batches: Sequence[MicroBatch]) -> Sequence[TeacherSignal]:
        """Give the signal for the loss tokens of each micro-batch.

        Args:
            batches: of this rank, made of the sequences of the last :meth:`begin`.

        Returns:
            One per micro-batch on the last stage, none elsewhere.
        """

    def close(self) -> None:
        """Give back what it holds."""


class MakeTeacher(Protocol):
    """Makes a source: most are classes."""

    signal: type[TeacherSignal]
    referenced: type[TeacherSignal] | None
    """What it gives with ``TeacherStart.reference``; None: it knows of no reference."""

    def __call__(self, start: TeacherStart) -> TeacherSource:
        """Make it, after the student was built; collective."""


def signal_of(config: Config) -> type[TeacherSignal]:
    """What a run's source will give, or all of its sources: no more than each of them gives.

    Raises:
        ConfigError: there is no such source, or it cannot take the reference.
    """
    kinds = [_signal_alone(alone) for alone in config.by_teacher.values()]
    if len(kinds) == 1:
        return kinds[0]
    referenced = all("reference" in kind.provides for kind in kinds)
    if all("full" in kind.provides for kind in kinds):
        return ReferencedSignal if referenced else RoutedSignal
    return ReferencedTopKSignal if referenced else TopKSignal


def _signal_alone(config: Config) -> type[TeacherSignal]:
    make = load_teacher(config.teacher.placement)
    if config.reference is None:
        return make.signal
    # A source from before there were references has no such attribute.
    referenced: type[TeacherSignal] | None = getattr(make, "referenced", None)
    if referenced is None:
        raise ConfigError(
            f"teacher.placement = {config.teacher.placement!r} takes no reference (it has no "
            f"attribute `referenced`), found teacher.reference = {config.teacher.reference!r}. "
            "Leave one of the two out."
        )
    return referenced


def load_teacher(name: str) -> MakeTeacher:
    """Find the source that ``teacher.placement`` names.

    Raises:
        ConfigError: there is none of this name.
    """
    make: MakeTeacher = load_part(__name__, name, attribute="SOURCE", setting="teacher.placement")
    return make
