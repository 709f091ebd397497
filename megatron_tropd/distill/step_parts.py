"""What a step is made with; ``pair.py`` makes it of the settings."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.dealing import Work
from megatron_tropd.data.mixing import Tasks
from megatron_tropd.data.routes import Routes
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.losses import Method
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.schedule import LossFn
from megatron_tropd.mcore.student import Student
from megatron_tropd.teacher import TeacherSource


class StudentPasses(Protocol):
    """The student as far as gradients go; ``mcore.student.Student`` is one."""

    @property
    def module(self) -> Any:
        """This rank's part of it, whose output layer a loss may look at before the step."""

    def score(self, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor]:
        """Give the hidden states of the loss tokens, no gradient; see ``Student.score``."""

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn
    ) -> list[dict[str, Tensor]]:
        """Add up the gradients; see ``Student.forward_backward``."""


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """What the gradients of a step are made with, on every rank."""

    student: StudentPasses
    teacher: TeacherSource
    loss: Method
    """Of the run; ``at_step`` makes it that of a step."""
    beta: float
    """Weight of tokens that the teacher wrote."""
    vocab_size: int
    """Columns that are real in both models."""
    layout: Layout
    tokens_per_micro_batch: int
    """Most padded positions of a micro-batch of whole rows, on any replica."""
    routes: Routes | None = None
    """Whose the prompts are, if there are several teachers."""
    metrics: bool = True
    """Whether to compute per-token values that the loss does not need."""
    clock: Callable[[str], AbstractContextManager[object]] = nullcontext
    """Entered with the name of each phase: "teacher", "student", "optimizer"."""


@dataclass(frozen=True, kw_only=True)
class StepParts(LossParts):
    """What a whole step is made with: packing and an optimizer beside the loss."""

    student: Student
    device: torch.device
    """Where micro-batches go."""
    pad_multiple: int = 1
    """Rows are padded to a multiple of it, which sequence parallelism asks for."""
    rounded_to: int = 1
    """And of this, if they have the room (``Layout.row_multiple``)."""
    batch_multiple: int = 1
    """A replica's number of micro-batches is a multiple of it, as an interleaved pipeline asks."""
    work: Work = float
    """Of a row of some padded length, in all models: by it micro-batches are dealt."""
    seed: int
    """Keys the mask draws, with the step and the sample."""
    tasks: Tasks | None = None
    """Which the prompts belong to, if there are several; metrics are told of each."""
    engine_gap: EngineGap | None = None
    """Compares engine and trainer; None: nobody does."""
