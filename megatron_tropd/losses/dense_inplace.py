r"""The dense passes on a CPU: each exponential is taken once and kept where its logit was.

The same sums and gradients as ``dense`` (formulas and names there), in fewer operations. The first
pass turns the student's logits z into exp(z - a), a the largest of this shard, and the teacher's
into the same, or into the difference of the two models' shifted logits where the reward is the
log-ratio itself. The sums that are linear in log-probs then need nothing more: with
:math:`E = \sum_v e^{z_v - a}` and :math:`M = \sum_v e^{z_v - a} d_v` of a shard, what the whole
vocabulary's normaliser adds to d is a constant of the row, so they are combined from
(a, E, M) of every rank (:func:`combine`). Only min(p, q) and the mixture need a second pass.

Shape suffixes: T = tokens of the chunk, v = real columns of this rank's shard, R = ranks.
"""

import torch
from torch import Tensor

from megatron_tropd.losses.dense import DenseSpec, RowCoefficients, Scratch

MOMENTS = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
"""Sums of ``dense.SUMS`` that the first pass gives."""

# Keeps quotients and logarithms of probabilities that underflowed finite. They are multiplied by
# the probability itself, so what they are does not matter.
_TINY = 2e-38


class InPlacePasses:
    """The passes over one chunk; the logits are gone after the first."""

    def __init__(
        self, student_Tv: Tensor, teacher_Tv: Tensor | None, spec: DenseSpec, scratch: Scratch
    ) -> None:
        """Nothing is computed yet.

        Args:
            student_Tv: [T, v] float32 logits, to be overwritten.
            teacher_Tv: [T, v] float32 logits, to be overwritten; None: not at hand.
            spec: which sums and which reward.
            scratch: for v columns.
        """
        self._student, self._teacher, self._spec, self._scratch = (
            student_Tv,
            teacher_Tv,
            spec,
            scratch,
        )
        self.moments = tuple(name for name in spec.sums if name in MOMENTS)
        self.sums = tuple(name for name in spec.sums if name not in MOMENTS)
        self._keeps_ratio = spec.reward == "log_ratio"
        # Where the gradient does without p, the second pass leaves w in the teacher's place.
        self._may_keep_reward = "reward" in spec.sums and not spec.teacher
        self._keeps_reward = False
        self._maxima = student_Tv.new_zeros(student_Tv.shape[0], 2)

    def first(self) -> Tensor:
        """[T, 2 (+ 2 + moments)]: largest logit and sum of exponentials of each model, moments."""
        num, columns = self._student.shape
        width = 2 if self._teacher is None else 4 + len(self.moments)
        stats = self._student.new_zeros(num, width)
        if columns == 0:
            stats[:, 0:width:2] = -torch.inf
            stats[:, 4:] = 0.0
            self._maxima.fill_(-torch.inf)
            return stats
        for rows, buffers in self._scratch.slices(num):
            stats[rows] = self._first(rows, buffers)
        self._maxima = stats[:, 0:4:2]
        return stats

    def _first(self, rows: slice, buffers: tuple[Tensor, ...]) -> Tensor:
        student = self._student[rows]
        student_max = _shift(student)
        if self._teacher is None:
            return torch.stack([student_max, student.exp_().sum(dim=-1)], dim=-1)
        teacher = self._teacher[rows]
        teacher_max = _shift(teacher)
        shifted_q, shifted_p, ratio, spare, spare_p, *_ = buffers
        if self.moments or self._keeps_ratio:
            torch.sub(teacher, student, out=ratio)
            # A sum is finite only if all its terms are: no column excluded by either model.
            excluded = not bool(ratio.sum().isfinite())
            shifted_q.copy_(student)
            shifted_p.copy_(teacher)
        student.exp_()
        exp_p = teacher.exp_() if not self._keeps_ratio else torch.exp(teacher, out=spare_p)
        columns = [student_max, student.sum(dim=-1), teacher_max, exp_p.sum(dim=-1)]
        for name in self.moments:
            weights = student if name in ("reverse_kl", "student_entropy") else exp_p
            values = {"student_entropy": shifted_q, "teacher_entropy": shifted_p}.get(name, ratio)
            product = torch.mul(weights, values, out=spare)
            if excluded:
                product = torch.where(weights == 0, 0.0, product)
            columns.append(product.sum(dim=-1))
        if self._keeps_ratio:
            teacher.copy_(torch.where(student == 0, 0.0, ratio) if excluded else ratio)
        return torch.stack(columns, dim=-1)

    def prepare(self) -> None:
        """Instead of the first two passes, where their results are known."""
        self.first()

    def second(self, student_norm_T2: Tensor, teacher_norm_T2: Tensor) -> Tensor:
        """[T, len(sums)] this shard's part of the sums that the first pass could not give."""
        sums = self._student.new_zeros(self._student.shape[0], len(self.sums))
        if not self.sums or self._student.shape[1] == 0:
            return sums
        assert self._teacher is not None
        factors = self._factors(student_norm_T2, teacher_norm_T2)
        for rows, buffers in self._scratch.slices(len(sums)):
            both = self._both(rows, factors, buffers)
            for column, name in enumerate(self.sums):
                if name != "reward":
                    sums[rows, column] = both.total(name, self._spec)
                    continue
                reward = both.reward(self._spec)
                sums[rows, column] = reward.sum(dim=-1)
                if self._may_keep_reward:
                    self._teacher[rows] = reward
        self._keeps_reward = self._may_keep_reward
        return sums

    def write_gradient(
        self,
        student_norm_T2: Tensor,
        teacher_norm_T2: Tensor | None,
        coefficients: RowCoefficients,
        out_Tv: Tensor,
    ) -> None:
        """Dense part of the gradient, student x q + reward x w + teacher x p, into ``out_Tv``.

        Args:
            student_norm_T2: [T, 2] whole-vocabulary normaliser.
            teacher_norm_T2: [T, 2] the teacher's; None where neither w nor p takes part.
            coefficients: the factors.
            out_Tv: [T, v] float32, overwritten; may be the student's logits.
        """
        num, columns = self._student.shape
        if columns == 0:
            return
        factors = self._factors(student_norm_T2, teacher_norm_T2)
        spec, kept = self._spec, self._student if self._teacher is None else self._teacher
        for rows, buffers in self._scratch.slices(num):
            factor = coefficients.student_T[rows, None]
            if spec.reward is None or self._keeps_reward:
                out = torch.mul(self._student[rows], factors[0][rows] * factor, out=out_Tv[rows])
                if self._keeps_reward:
                    out.addcmul_(kept[rows], coefficients.reward_T[rows, None])
                elif spec.teacher:
                    out.addcmul_(kept[rows], factors[1][rows] * coefficients.teacher_T[rows, None])
                continue
            both = self._both(rows, factors, buffers)
            part = both.reward(spec)
            out = torch.mul(both.q, factor, out=out_Tv[rows])
            if spec.teacher:
                out.addcmul_(both.p, coefficients.teacher_T[rows, None])
            weight = coefficients.reward_T[rows, None]
            if self._keeps_ratio:  # the only reward that can be infinite
                part = torch.where(weight == 0, 0.0, part)
            out.addcmul_(part, weight)

    def _factors(
        self, student_norm_T2: Tensor, teacher_norm_T2: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 1] each: exp(z - a) -> q, the same for p, and what r is above the kept difference."""
        log_q = _log_factor(self._maxima[:, 0], student_norm_T2)
        q = torch.where(self._maxima[:, 0] == -torch.inf, 0.0, log_q.exp())
        if teacher_norm_T2 is None:
            return q[:, None], q[:, None], q[:, None]
        log_p = _log_factor(self._maxima[:, 1], teacher_norm_T2)
        p = torch.where(self._maxima[:, 1] == -torch.inf, 0.0, log_p.exp())
        return q[:, None], p[:, None], (log_p - log_q)[:, None]

    def _both(
        self, rows: slice, factors: tuple[Tensor, Tensor, Tensor], buffers: tuple[Tensor, ...]
    ) -> "_Rows":
        assert self._teacher is not None
        q, p, ratio = (factor[rows] for factor in factors)
        kept = self._teacher[rows]
        return _Rows(
            q=torch.mul(self._student[rows], q, out=buffers[0]),
            p=None if self._keeps_ratio else torch.mul(kept, p, out=buffers[1]),
            ratio=torch.add(kept, ratio, out=buffers[2]) if self._keeps_ratio else None,
            spare=buffers[3],
            other=buffers[4],
        )


class _Rows:
    """q and either p or r of a few rows, in borrowed buffers."""

    def __init__(
        self, *, q: Tensor, p: Tensor | None, ratio: Tensor | None, spare: Tensor, other: Tensor
    ) -> None:
        self.q, self._p, self._ratio, self._spare, self._other = q, p, ratio, spare, other

    @property
    def p(self) -> Tensor:
        assert self._p is not None
        return self._p

    def total(self, name: str, spec: DenseSpec) -> Tensor:
        """[rows] "tv" or "teacher_to_mixture"."""
        if name == "tv":
            return torch.sub(self.q, self._overlap(), out=self._spare).sum(dim=-1)
        return -self._weighted_log_share(self.p, self.q, 1 - spec.mix).sum(dim=-1)

    def reward(self, spec: DenseSpec) -> Tensor:
        """[rows, v] w of ``dense.Reward``, in a buffer that the next call overwrites."""
        if spec.reward == "log_ratio":
            assert self._ratio is not None
            return torch.mul(self.q, self._ratio, out=self._spare)
        if spec.reward == "mixture":
            return self._weighted_log_share(self.q, self.p, spec.mix)
        ratio = self._log_ratio()
        inside = self._overlap().mul_(ratio)
        if spec.reward == "trust":
            return inside
        outside = (self.q - self.p).clamp_(min=0.0)
        return inside.add_(outside.mul_(ratio.clamp_(min=spec.tau)))

    def _overlap(self) -> Tensor:
        """min(p, q)."""
        if self._p is not None:
            return torch.minimum(self._p, self.q, out=self._spare)
        assert self._ratio is not None
        return torch.clamp(self._ratio, max=0.0, out=self._spare).exp_().mul_(self.q)

    def _log_ratio(self) -> Tensor:
        """log p/q, right wherever neither has underflowed."""
        torch.add(self.q, _TINY, out=self._spare)
        torch.add(self.p, _TINY, out=self._other)
        return self._other.div_(self._spare).log_()

    def _weighted_log_share(self, of: Tensor, other: Tensor, share: float) -> Tensor:
        """of x log((share other + (1 - share) of) / of)."""
        torch.add(of, _TINY, out=self._spare)
        torch.div(other, self._spare, out=self._spare)
        return self._spare.mul_(share).add_(1 - share).log_().mul_(of)


def combine(
    stats_RTn: Tensor, student_norm_T2: Tensor, teacher_norm_T2: Tensor, moments: tuple[str, ...]
) -> Tensor:
    """Whole-vocabulary moments from every rank's first pass.

    Args:
        stats_RTn: [R, T, 4 + moments] from :meth:`InPlacePasses.first` of each rank.
        student_norm_T2: [T, 2] whole-vocabulary normaliser.
        teacher_norm_T2: [T, 2] the teacher's.
        moments: their names.

    Returns:
        [T, moments] float32.
    """
    log_q = _log_factor(stats_RTn[..., 0], student_norm_T2)
    log_p = _log_factor(stats_RTn[..., 2], teacher_norm_T2)
    models = {
        "q": (stats_RTn[..., 0], log_q, stats_RTn[..., 1]),
        "p": (stats_RTn[..., 2], log_p, stats_RTn[..., 3]),
    }
    recipe: dict[str, tuple[str, Tensor, float]] = {
        "reverse_kl": ("q", log_p - log_q, -1.0),
        "forward_kl": ("p", log_p - log_q, 1.0),
        "student_entropy": ("q", log_q, -1.0),
        "teacher_entropy": ("p", log_p, -1.0),
    }
    columns = []
    for column, name in enumerate(moments, start=4):
        model, constant, sign = recipe[name]
        maxima, log_factor, total = models[model]
        factor = torch.where(maxima == -torch.inf, 0.0, log_factor.exp())
        part = factor * (stats_RTn[..., column] + constant * total)
        columns.append(sign * torch.where(factor == 0, 0.0, part).sum(dim=0))
    if not columns:
        return stats_RTn[0, :, :0]
    return torch.stack(columns, dim=-1)


def _shift(logits: Tensor) -> Tensor:
    """Subtract each row's maximum in place; a row of -inf stays. Returns the maxima [rows]."""
    maxima = logits.amax(dim=-1)
    logits.sub_(_finite(maxima)[:, None])
    return maxima


def _finite(maxima: Tensor) -> Tensor:
    return torch.where(maxima == -torch.inf, 0.0, maxima)


def _log_factor(maxima: Tensor, norm_T2: Tensor) -> Tensor:
    """Log of what turns exp(z - a) into a probability. Two subtractions, for large logits."""
    return (_finite(maxima) - norm_T2[:, 0]) - norm_T2[:, 1]
