r"""The three passes over a chunk's logits that cost something, in plain torch.

With q = softmax(student), p = softmax(teacher) and r = log p - log q, a loss over the whole
vocabulary is a sum of row sums (:func:`row_sums`), and its gradient has the form

.. math:: \partial \ell / \partial z_j = c_j - q_j \sum_v c_v, \qquad
   c_v = a \, w_v + f \, p_v + \text{a few columns}

with w one of the pointwise rewards of ``config.loss.Reward`` (:func:`write_gradient`). Nothing here
knows about ranks; the sums are this shard's. Rows are handled a few at a time, so that temporaries
stay in the cache: one buffer of a few rows for each, none of [T, v].

Shape suffixes: T = tokens of the chunk, v = real columns of this rank's shard.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_tropd.config.loss import Reward
from megatron_tropd.losses import tensors

SUMS = (
    "tv",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "reward",
    "teacher_to_mixture",
)
"""Row sums: TV(p, q), KL(q||p), KL(p||q), H(q), H(p), sum of w, KL(p || b p + (1-b) q)."""

# About the size of a core's cache; a GPU wants large launches instead.
_SLICE_BYTES = {"cpu": 2**20}
_SLICE_BYTES_ELSEWHERE = 2**26
_BUFFERS = 7
HUGE_RATIO = 80.0
"""log p/q of which the exponential is still finite in float32."""


@dataclass(frozen=True)
class DenseSpec:
    """What to sum over the vocabulary, and which reward the gradient has."""

    sums: tuple[str, ...] = ()
    """Subset of :data:`SUMS`."""
    reward: Reward | None = None
    """w of the gradient and of the sum "reward"."""
    reward_floor: float = 0.0
    """Floor of r in trust_clip."""
    mix: float = 0.5
    """b of mixture."""
    power: float = 1.0
    """a of power."""
    teacher: bool = False
    """Whether p takes part in the gradient."""


@dataclass(frozen=True)
class RowCoefficients:
    """Per-token factors of the gradient; see the module's formula."""

    student_T: Tensor
    """[T] float32: minus the sum of all c_v; multiplies q."""
    reward_T: Tensor
    """[T] float32: a; multiplies w."""
    teacher_T: Tensor
    """[T] float32: f; multiplies p."""

    def silence(self, out_Tv: Tensor) -> None:
        """Set the rows whose factors are all 0 to 0, whatever they hold: 0 x nan would be nan."""
        silent_T = (self.student_T == 0) & (self.reward_T == 0) & (self.teacher_T == 0)
        if tensors.can_be_asked(out_Tv):
            out_Tv.index_fill_(0, silent_T.nonzero()[:, 0], 0.0)
        else:
            out_Tv.masked_fill_(silent_T.unsqueeze(-1), 0.0)


class Scratch:
    """Buffers of a few rows, made once per call, and only where a pass asks for them."""

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        budget: int | None = None,
        widest: int | None = None,
    ) -> None:
        """Buffers of ``columns`` float32 and as many rows as fill a cache.

        Args:
            columns: v.
            device: of the logits.
            budget: bytes of everything; the buffers take a quarter at most, but one row.
            widest: columns of the rank that holds most, for which rows and bytes are counted, so
                that all ranks count alike; None: ``columns``.
        """
        size = _SLICE_BYTES.get(device.type, _SLICE_BYTES_ELSEWHERE)
        if budget is not None:
            size = min(size, budget // (4 * _BUFFERS))
        widest = columns if widest is None else widest
        self.rows = max(1, size // (4 * max(widest, 1)))
        self.bytes = 4 * _BUFFERS * self.rows * widest
        self._columns, self._device = columns, device

    @cached_property
    def buffers(self) -> Tensor:
        """[7, rows, columns] float32."""
        shape = (_BUFFERS, self.rows, self._columns)
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def slices(self, num: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Rows of a chunk, a few at a time, and buffers of as many rows."""
        for begin in range(0, num, self.rows):
            end = min(begin + self.rows, num)
            yield slice(begin, end), self.buffers[:, : end - begin].unbind(0)


def max_and_sum_exp(logits_Tv: Tensor, scratch: Scratch) -> Tensor:
    """Largest logit and sum of exp(logit - largest) of each row.

    Args:
        logits_Tv: [T, v] float32; v may be 0. Not modified.
        scratch: for v columns.

    Returns:
        [T, 2] float32; (-inf, 0) where there is no column or all are -inf.
    """
    stats_T2 = logits_Tv.new_zeros(logits_Tv.shape[0], 2)
    if logits_Tv.shape[1] == 0:
        stats_T2[:, 0] = -torch.inf
        return stats_T2
    for rows, (shifted, *_) in scratch.slices(logits_Tv.shape[0]):
        max_T1 = logits_Tv[rows].amax(dim=-1, keepdim=True)
        # -inf - -inf would be nan; any finite shift gives the right sum, 0.
        shift_T1 = torch.where(max_T1 == -torch.inf, 0.0, max_T1)
        torch.sub(logits_Tv[rows], shift_T1, out=shifted)
        stats_T2[rows, 0] = max_T1[:, 0]
        torch.sum(shifted.exp_(), dim=-1, out=stats_T2[rows, 1])
    return stats_T2


def row_sums(
    student_Tv: Tensor,
    teacher_Tv: Tensor,
    student_norm_T2: Tensor,
    teacher_norm_T2: Tensor,
    spec: DenseSpec,
    scratch: Scratch,
) -> Tensor:
    """This shard's part of the sums that ``spec`` asks for.

    Args:
        student_Tv: [T, v] float32 logits. Not modified.
        teacher_Tv: [T, v] float32 logits. Not modified.
        student_norm_T2: [T, 2] float32 whole-vocabulary (max, log of the sum of exponentials).
        teacher_norm_T2: [T, 2] the teacher's.
        spec: which.
        scratch: for v columns.

    Returns:
        [T, len(spec.sums)] float32.
    """
    sums_TD = student_Tv.new_zeros(student_Tv.shape[0], len(spec.sums))
    if student_Tv.shape[1] == 0 or not spec.sums:
        return sums_TD
    for rows, buffers in scratch.slices(student_Tv.shape[0]):
        both = _Both(student_Tv[rows], teacher_Tv[rows], student_norm_T2[rows], *buffers)
        both.normalise(teacher_norm_T2[rows])
        for column, name in enumerate(spec.sums):
            sums_TD[rows, column] = both.total(name, spec)
    return sums_TD


def write_gradient(
    student_Tv: Tensor,
    teacher_Tv: Tensor | None,
    student_norm_T2: Tensor,
    teacher_norm_T2: Tensor | None,
    coefficients: RowCoefficients,
    spec: DenseSpec,
    scratch: Scratch,
    out_Tv: Tensor,
) -> None:
    """The dense part of the gradient: student x q + reward x w + teacher x p.

    Rows whose factors are all 0 become 0, whatever the logits hold.

    Args:
        student_Tv: [T, v] float32 logits.
        teacher_Tv: [T, v] float32 logits; None where neither w nor p takes part.
        student_norm_T2: [T, 2] as for :func:`row_sums`.
        teacher_norm_T2: [T, 2] the teacher's, or None.
        coefficients: the factors.
        spec: which w.
        scratch: for v columns.
        out_Tv: [T, v] float32, overwritten; may be ``student_Tv`` itself.
    """
    for rows, buffers in scratch.slices(student_Tv.shape[0] if student_Tv.shape[1] else 0):
        teacher = student_Tv if teacher_Tv is None else teacher_Tv
        both = _Both(student_Tv[rows], teacher[rows], student_norm_T2[rows], *buffers)
        factor_T1 = coefficients.student_T[rows, None]
        if teacher_norm_T2 is None or not (spec.reward or spec.teacher):
            torch.mul(both.student_only(), factor_T1, out=out_Tv[rows])
            continue
        both.normalise(teacher_norm_T2[rows])
        part = both.reward(spec) if spec.reward else None
        total = torch.mul(both.q, factor_T1, out=out_Tv[rows])
        if spec.teacher:
            total.addcmul_(both.p, coefficients.teacher_T[rows, None])
        if part is not None:
            both.add_product(total, part, coefficients.reward_T[rows, None])
    coefficients.silence(out_Tv)


class _Both:
    """Log-probs and probabilities of a few rows of both models, in borrowed buffers."""

    def __init__(
        self, student: Tensor, teacher: Tensor, student_norm: Tensor, *buffers: Tensor
    ) -> None:
        self._student, self._teacher, self._student_norm = student, teacher, student_norm
        self.log_q, self.q, self.log_p, self.p, self.ratio, self._spare, self._log_mix = buffers
        self._has_mixture = False

    def student_only(self) -> Tensor:
        """q, where the teacher does not matter."""
        _normalise(self._student, self._student_norm, out=self.log_q)
        return torch.exp(self.log_q, out=self.q)

    def normalise(self, teacher_norm: Tensor) -> None:
        """Fill log q, q, log p, p and r = log p - log q."""
        self.student_only()
        _normalise(self._teacher, teacher_norm, out=self.log_p)
        torch.exp(self.log_p, out=self.p)
        torch.sub(self.log_p, self.log_q, out=self.ratio)
        # Columns that a model excludes are rare; only they need the branch 0 x inf = 0. A sum is
        # finite only if all its terms are; asking a GPU would cost more than the branch.
        asked = tensors.can_be_asked(self.ratio)
        self._excluded = not asked or not bool(self.ratio.sum().isfinite())

    def total(self, name: str, spec: DenseSpec) -> Tensor:
        """[rows] one of :data:`SUMS`."""
        if name == "tv":
            return torch.sub(self.q, self._overlap(), out=self._spare).sum(dim=-1)
        if name == "reverse_kl":
            return -self._product(self.q, self.ratio).sum(dim=-1)
        if name == "forward_kl":
            return self._product(self.p, self.ratio).sum(dim=-1)
        if name == "student_entropy":
            return -self._product(self.q, self.log_q).sum(dim=-1)
        if name == "teacher_entropy":
            return -self._product(self.p, self.log_p).sum(dim=-1)
        if name == "teacher_to_mixture":
            return self._product(self.p, self._over_mixture(spec.mix)).sum(dim=-1)
        return self.reward(spec).sum(dim=-1)

    def reward(self, spec: DenseSpec) -> Tensor:
        """[rows, v] w of ``config.loss.Reward``, in a buffer that the next call overwrites."""
        if spec.reward == "log_ratio":
            return self._product(self.q, self.ratio)
        if spec.reward == "mixture":
            return self._product(self.q, self._log_mixture(spec.mix))
        if spec.reward == "power":
            return self._powers(spec.power)
        inside = self._product(self._overlap(), self.ratio)
        if spec.reward == "trust":
            return inside
        assert spec.reward == "trust_clip"
        outside = (self.q - self.p).clamp_(min=0.0)
        return inside + self._mask_zero(outside, outside * self.ratio.clamp(min=spec.reward_floor))

    def _powers(self, power: float) -> Tensor:
        """Q (p^a - q^a), in the spare buffer."""
        self._has_mixture = False
        of_student = torch.mul(self.log_q, power, out=self._log_mix).exp_()
        of_teacher = torch.mul(self.log_p, power, out=self._spare).exp_()
        return of_teacher.sub_(of_student).mul_(self.q)

    def add_product(self, total: Tensor, part: Tensor, factor: Tensor) -> None:
        """Total += part x factor, where a factor of 0 silences an infinite part."""
        if self._excluded:
            part = self._mask_zero(factor, part)
        total.addcmul_(part, factor)

    def _overlap(self) -> Tensor:
        return torch.minimum(self.p, self.q, out=self._spare)

    def _log_mixture(self, mix: float) -> Tensor:
        """log((b p + (1 - b) q) / q), in a buffer of its own."""
        if not self._has_mixture:
            share = torch.clamp(self.ratio, max=HUGE_RATIO, out=self._log_mix).exp_()
            mixture_over_q(share, mix, out=share)
            # Beyond that b p / q is all there is, and p / q may be infinite.
            huge = self.ratio >= HUGE_RATIO
            self._log_mix.copy_(torch.where(huge, self.ratio + math.log(mix), self._log_mix))
            self._has_mixture = True
        return self._log_mix

    def _over_mixture(self, mix: float) -> Tensor:
        """log(p / (b p + (1 - b) q)), in the spare buffer."""
        if mix > 0.5:
            inverse = torch.clamp(self.ratio, min=-HUGE_RATIO, out=self._spare).neg_().exp_()
            return mixture_over_q(inverse, 1 - mix, out=inverse).neg_()
        torch.sub(self.ratio, self._log_mixture(mix), out=self._spare)
        return self._spare.masked_fill_(self.ratio >= HUGE_RATIO, -math.log(mix))

    def _product(self, weights: Tensor, values: Tensor) -> Tensor:
        """Weights x values in the spare buffer, 0 where the weight is."""
        if not self._excluded:
            return torch.mul(weights, values, out=self._spare)
        return self._spare.copy_(self._mask_zero(weights, weights * values))

    @staticmethod
    def _mask_zero(weights: Tensor, products: Tensor) -> Tensor:
        return torch.where(weights == 0, 0.0, products)


def _normalise(logits: Tensor, norm: Tensor, *, out: Tensor) -> None:
    # Two subtractions: max + log_sum would round to the precision of the largest logit.
    torch.sub(logits, norm[:, :1], out=out).sub_(norm[:, 1:])


def mixture_over_q(share: Tensor, mix: float, out: Tensor) -> Tensor:
    """log((b p + (1 - b) q) / q) of a share p / q, in the one of two forms that keeps its digits.

    ``mix`` is b in (0, 1); ``out`` is overwritten, and may be ``share``.
    """
    if mix <= 0.5:  # 1 - b would swallow a small b
        return torch.sub(share, 1.0, out=out).mul_(mix).log1p_()
    return torch.mul(share, mix, out=out).add_(1 - mix).log_()


def sum_names(names: Sequence[str]) -> tuple[str, ...]:
    """The given sums without repetition, in the order of :data:`SUMS`."""
    return tuple(name for name in SUMS if name in names)
