"""Which implementation of the dense passes serves a chunk."""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tropd.losses import dense
from megatron_tropd.losses.dense import DenseSpec, RowCoefficients, Scratch
from megatron_tropd.losses.dense_inplace import InPlacePasses


class Passes(Protocol):
    """Three passes over the logits of one chunk, between which the ranks talk.

    ``norm`` is [T, 2], of the whole vocabulary (``vocab_parallel.combine_normalisers``).
    """

    moments: tuple[str, ...]
    """Sums of the specification that :meth:`first` prepares (``dense_inplace.combine``)."""
    sums: tuple[str, ...]
    """The others, which :meth:`second` gives."""

    def first(self) -> Tensor:
        """[T, 2 or 4 + moments] float32; columns as in ``InPlacePasses.first``."""
        ...

    def second(self, student_norm_T2: Tensor, teacher_norm_T2: Tensor) -> Tensor:
        """[T, len(sums)] float32, this shard's part."""
        ...

    def prepare(self) -> None:
        """Instead of the first two, where their results are known from an earlier time."""
        ...

    def write_gradient(
        self,
        student_norm_T2: Tensor,
        teacher_norm_T2: Tensor | None,
        coefficients: RowCoefficients,
        out_Tv: Tensor,
    ) -> None:
        """The dense part of the gradient, student x q + reward x w + teacher x p, into ``out_Tv``.

        Rows whose factors are all 0 become 0, whatever the logits hold.

        Args:
            student_norm_T2: the student's normaliser.
            teacher_norm_T2: the teacher's; None where neither w nor p takes part.
            coefficients: the factors.
            out_Tv: [T, v] float32 (the kernels: or bfloat16), overwritten; may be the student's
                logits.
        """
        ...


class StatelessPasses:
    """``dense`` or ``dense_triton``: every pass starts from the logits."""

    def __init__(
        self,
        module: Any,
        student_Tv: Tensor,
        teacher_Tv: Tensor | None,
        spec: DenseSpec,
        scratch: Scratch,
    ) -> None:
        self._module, self._spec, self._scratch = module, spec, scratch
        self._student, self._teacher = student_Tv, teacher_Tv
        self.moments: tuple[str, ...] = ()
        self.sums = spec.sums

    def first(self) -> Tensor:
        """See :class:`Passes`."""
        models = [self._student] if self._teacher is None else [self._student, self._teacher]
        stats = [self._module.max_and_sum_exp(logits, self._scratch) for logits in models]
        return torch.cat(stats, dim=-1)

    def second(self, student_norm_T2: Tensor, teacher_norm_T2: Tensor) -> Tensor:
        """See :class:`Passes`."""
        sums: Tensor = self._module.row_sums(
            self._student,
            self._teacher,
            student_norm_T2,
            teacher_norm_T2,
            self._spec,
            self._scratch,
        )
        return sums

    def prepare(self) -> None:
        """See :class:`Passes`."""

    def write_gradient(
        self,
        student_norm_T2: Tensor,
        teacher_norm_T2: Tensor | None,
        coefficients: RowCoefficients,
        out_Tv: Tensor,
    ) -> None:
        """See :class:`Passes`."""
        self._module.write_gradient(
            self._student,
            None if teacher_norm_T2 is None else self._teacher,
            student_norm_T2,
            teacher_norm_T2,
            coefficients,
            self._spec,
            self._scratch,
            out_Tv,
        )


def passes_for(
    student_Tv: Tensor, teacher_Tv: Tensor | None, spec: DenseSpec, scratch: Scratch
) -> Passes:
    """The passes over a chunk on its device.

    A CPU gets ``dense_inplace``. CUDA gets the Triton kernels where Triton is installed, as it is
    with torch's own CUDA builds; everything else plain torch. ``TROPD_PLAIN=1`` in the environment
    means plain torch everywhere: whether a difference goes away with it tells whose fault it is.
    Every rank of a group needs the same ones: they decide what travels.

    Args:
        student_Tv: [T, v] float32 logits; may be overwritten.
        teacher_Tv: [T, v] float32 logits; may be overwritten. None: not at hand.
        spec: which sums and which reward.
        scratch: for v columns.

    Returns:
        The passes.
    """
    if student_Tv.is_cpu and not _plain():
        return InPlacePasses(student_Tv, teacher_Tv, spec, scratch)
    module = _module(student_Tv.device)
    return StatelessPasses(module, student_Tv, teacher_Tv, spec, scratch)


def max_and_sum_exp(logits_Tv: Tensor, scratch: Scratch) -> Tensor:
    """[T, 2] largest logit and sum of exp(logit - largest), by the device's implementation.

    Args:
        logits_Tv: [T, v] float32. Not modified.
        scratch: for v columns.
    """
    stats_T2: Tensor = _module(logits_Tv.device).max_and_sum_exp(logits_Tv, scratch)
    return stats_T2


def needs_scratch(device: torch.device) -> bool:
    """Whether the passes on a device use their ``Scratch``; the kernels do not."""
    return device.type == "cpu" or _module(device) is dense


def _plain() -> bool:
    return os.environ.get("TROPD_PLAIN") == "1"


def _module(device: torch.device) -> Any:
    kernels = _kernels() if device.type == "cuda" and not _plain() else None
    return kernels or dense


@cache
def _kernels() -> Any:
    if find_spec("triton") is None:
        return None
    # Here and not above: nothing on a CPU needs it, and importing it takes time.
    from megatron_tropd.losses import dense_triton

    return dense_triton
