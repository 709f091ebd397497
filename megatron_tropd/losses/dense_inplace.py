r"""The dense passes on a CPU: each exponential is taken once and kept where its logit was.

The same sums and gradients as ``dense`` (formulas and names there), in fewer operations. The first
pass turns the student's logits z into exp(z - a), a the largest of this shard, and the teacher's
into the same; or, where min(p, q) or a reward is asked for, into the difference of the two models'
shifted logits, of which p / q is one exponential, and log p/q needs no logarithm. The sums that are
linear in log-probs then need nothing more: with
:math:`E = \sum_v e^{z_v - a}` and :math:`M = \sum_v e^{z_v - a} d_v` of a shard, what the whole
vocabulary's normaliser adds to d is a constant of the row, so they are combined from
(a, E, M) of every rank (:func:`combine`). Only min(p, q) and the mixture need a second pass.

Shape suffixes: T = tokens of the chunk, v = real columns of this rank's shard, R = ranks.
"""

import torch
from torch import Tensor

from megatron_tropd.losses.dense import DenseSpec, RowCoefficients, Scratch, mixture_over_q

MOMENTS = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
"""Sums of ``dense.SUMS`` that the first pass gives."""

# A student's logits further below the largest of their row than this are raised to it, and so is a
# shard's largest below the whole row's: what becomes of q, 1e-26 or 1e-11 of a shard's largest,
# changes no sum, and the ratio to it brings p back. The product of both, 1e-37, is not denormal,
# and one over it is finite.
_LOWEST, _LOWEST_SHARD = -60.0, -25.0
_LEAST_SHARE = 1e-37
# A log-probability that is none.
_NOTHING = -1e4


class InPlacePasses:
    """The passes over one chunk; the logits are gone after the first."""

    def __init__(
        self, student_Tv: Tensor, teacher_Tv: Tensor | None, spec: DenseSpec, scratch: Scratch
    ) -> None:
        """Nothing is computed yet; the arguments are those of ``passes.passes_for``."""
        self._student, self._teacher = student_Tv, teacher_Tv
        self._spec, self._scratch = spec, scratch
        self.moments = tuple(name for name in spec.sums if name in MOMENTS)
        self.sums = tuple(name for name in spec.sums if name not in MOMENTS)
        self._keeps_ratio = spec.reward is not None or bool(self.sums)
        # Where the gradient does without p, the second pass leaves w in the ratio's place.
        self._may_keep_reward = "reward" in spec.sums and not spec.teacher
        self._keeps_reward = False
        self._is_normalised = False
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
        shifted_q, shifted_p, ratio, spare, exp_p, *_ = buffers
        # False for nan as well.
        ordinary = bool(student.amin() > _LOWEST) and bool(teacher.amin() > _LOWEST)
        if "student_entropy" in self.moments:
            shifted_q.copy_(student)
        if "teacher_entropy" in self.moments:
            shifted_p.copy_(teacher)
        if self._keeps_ratio:
            torch.exp(teacher, out=exp_p)
            keep = None if ordinary else self._guarded(student, teacher)
            ratio = torch.sub(teacher, student, out=teacher)
        else:
            keep = None
            if self.moments:
                torch.sub(teacher, student, out=ratio)
            exp_p = teacher.exp_()
        student.exp_()
        columns = [student_max, student.sum(dim=-1), teacher_max, exp_p.sum(dim=-1)]
        for name in self.moments:
            weights = student if name in ("reverse_kl", "student_entropy") else exp_p
            values = {"student_entropy": shifted_q, "teacher_entropy": shifted_p}.get(name, ratio)
            product = torch.mul(weights, values, out=spare)
            if not ordinary:
                product = torch.where(weights == 0, 0.0, product)
            columns.append(product.sum(dim=-1))
        if keep is not None:
            student.copy_(keep[0])
            teacher.copy_(keep[1])
        return torch.stack(columns, dim=-1)

    def _guarded(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """exp(z - a) and a ratio to keep where logits are far below the largest, or excluded.

        A student's logit too small for its exponential is raised, and the ratio lowered with it:
        p = q exp(ratio) comes out although q would have been lost.
        """
        if self._spec.reward == "log_ratio":  # this reward is infinite where p is 0 and q is not
            exp_q = student.exp()
            return exp_q, torch.where(exp_q == 0, 0.0, teacher - student)
        excluded = (student == -torch.inf) & (teacher == -torch.inf)
        raised = student.clamp(min=_LOWEST)
        ratio = teacher.clamp(min=2 * _LOWEST) - raised
        return (
            torch.where(excluded, 0.0, raised.exp_()),
            torch.where(excluded, 0.0, ratio),
        )

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
            if "reward" in self.sums:  # last: it may take the ratio's place
                out = self._teacher[rows] if self._may_keep_reward else buffers[1]
                reward = both.write_reward(self._spec, out)
                sums[rows, self.sums.index("reward")] = reward.sum(dim=-1)
        self._keeps_reward = self._may_keep_reward
        self._is_normalised = True
        return sums

    def write_gradient(
        self,
        student_norm_T2: Tensor,
        teacher_norm_T2: Tensor | None,
        coefficients: RowCoefficients,
        out_Tv: Tensor,
    ) -> None:
        """See ``passes.Passes``."""
        if self._student.shape[1] == 0:
            return
        factors = self._factors(student_norm_T2, teacher_norm_T2)
        if self._keeps_reward or not self._keeps_ratio:
            self._write_from_kept(factors, coefficients, out_Tv)
        else:
            self._write_from_ratio(factors, coefficients, out_Tv)
        coefficients.silence(out_Tv)

    def _write_from_ratio(
        self, factors: tuple[Tensor, Tensor, Tensor], coefficients: RowCoefficients, out_Tv: Tensor
    ) -> None:
        """The gradient where q and the ratio are in the models' places."""
        for rows, buffers in self._scratch.slices(len(out_Tv)):
            both = self._both(rows, factors, buffers)
            if self._spec.reward is None:
                part = buffers[1].zero_()
            else:
                part = both.write_reward(self._spec, buffers[1])
                weight = coefficients.reward_T[rows, None]
                if self._spec.reward == "log_ratio":  # the only reward that can be infinite
                    part = torch.where(weight == 0, 0.0, part)
                part.mul_(weight)
            if self._spec.teacher:
                part.addcmul_(both.p, coefficients.teacher_T[rows, None])
            torch.addcmul(part, both.q, coefficients.student_T[rows, None], out=out_Tv[rows])

    def _write_from_kept(
        self, factors: tuple[Tensor, Tensor, Tensor], coefficients: RowCoefficients, out_Tv: Tensor
    ) -> None:
        """The gradient where the teacher's place holds w, or its exponentials."""
        kept = self._student if self._teacher is None else self._teacher
        for rows, _ in self._scratch.slices(len(out_Tv)):
            factor = coefficients.student_T[rows, None]
            if not self._is_normalised:
                factor = factor * factors[0][rows]
            out = torch.mul(self._student[rows], factor, out=out_Tv[rows])
            if self._keeps_reward:
                out.addcmul_(kept[rows], coefficients.reward_T[rows, None])
            elif self._spec.teacher:
                out.addcmul_(kept[rows], factors[1][rows] * coefficients.teacher_T[rows, None])

    def _factors(
        self, student_norm_T2: Tensor, teacher_norm_T2: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, 1] each: exp(z - a) -> q, the same for p, and what r is above the kept difference."""
        lowest = _LOWEST_SHARD if self._keeps_ratio else -torch.inf
        log_q = _log_factor(self._maxima[:, 0], student_norm_T2).clamp(min=lowest)
        log_q = torch.where(self._maxima[:, 0] == -torch.inf, lowest, log_q)
        if teacher_norm_T2 is None:
            log_p = log_q
        else:
            log_p = _log_factor(self._maxima[:, 1], teacher_norm_T2).clamp(min=_NOTHING)
            log_p = torch.where(self._maxima[:, 1] == -torch.inf, _NOTHING, log_p)
        return log_q.exp()[:, None], log_p.exp()[:, None], (log_p - log_q)[:, None]

    def _both(
        self, rows: slice, factors: tuple[Tensor, Tensor, Tensor], buffers: tuple[Tensor, ...]
    ) -> "_Rows":
        assert self._teacher is not None
        student, ratio = self._student[rows], self._teacher[rows]
        if not self._is_normalised:
            student.mul_(factors[0][rows])
            ratio.add_(factors[2][rows])
        return _Rows(student, ratio, share=buffers[0], spare=buffers[2], other=buffers[3])


class _Rows:
    """q and r of a few rows, and what follows from them, in borrowed buffers."""

    def __init__(
        self, q: Tensor, ratio: Tensor, *, share: Tensor, spare: Tensor, other: Tensor
    ) -> None:
        self.q, self.ratio = q, ratio
        self._share, self._spare, self._other = share, spare, other
        self._has_share = self._has_log_mixture = False

    @property
    def share(self) -> Tensor:
        """P / q."""
        if not self._has_share:
            torch.exp(self.ratio, out=self._share)
            self._has_share = True
        return self._share

    @property
    def p(self) -> Tensor:
        """In the spare buffer; last of all."""
        return torch.mul(self.q, self.share, out=self._spare)

    def total(self, name: str, spec: DenseSpec) -> Tensor:
        """[rows] "tv" or "teacher_to_mixture"."""
        if name == "tv":
            inside = torch.clamp(self.share, max=1.0, out=self._other)
            return inside.sub_(1.0).mul_(self.q).sum(dim=-1).neg_()
        return self._over_mixture(spec.mix).mul_(self.share).mul_(self.q).sum(dim=-1)

    def write_reward(self, spec: DenseSpec, out: Tensor) -> Tensor:
        """[rows, v] w of ``dense.Reward`` into ``out``, which may be the ratio's place."""
        if spec.reward == "log_ratio":
            return torch.mul(self.q, self.ratio, out=out)
        if spec.reward == "mixture":
            return torch.mul(self._log_mixture(spec.mix), self.q, out=out)
        if spec.reward == "power":
            of_teacher = self.p.pow_(spec.power)
            of_student = torch.pow(self.q, spec.power, out=self._other)
            return torch.sub(of_teacher, of_student, out=out).mul_(self.q)
        inside = torch.clamp(self.share, max=1.0, out=self._spare)
        if spec.reward == "trust":
            return torch.mul(self.ratio, inside.mul_(self.q), out=out)
        floored = torch.clamp(self.ratio, min=spec.reward_floor, out=self._other)
        # min(p, q) r + (q - min(p, q)) max(r, floor), over q
        torch.sub(self.ratio, floored, out=out)
        return out.mul_(inside).add_(floored).mul_(self.q)

    def _over_mixture(self, mix: float) -> Tensor:
        """log(p / (b p + (1 - b) q)), in the other buffer."""
        if mix <= 0.5:
            return torch.sub(self.ratio, self._log_mixture(mix), out=self._other)
        # Small where b is nearly 1. Not 1 / 0: where p / q underflows, p is 0 and so is its term.
        inverse = torch.clamp(self.share, min=_LEAST_SHARE, out=self._other).reciprocal_()
        return mixture_over_q(inverse, 1 - mix, out=inverse).neg_()

    def _log_mixture(self, mix: float) -> Tensor:
        """log((b p + (1 - b) q) / q), in the spare buffer."""
        if not self._has_log_mixture:
            mixture_over_q(self.share, mix, out=self._spare)
            self._has_log_mixture = True
        return self._spare


def combine(
    stats_RTn: Tensor, student_norm_T2: Tensor, teacher_norm_T2: Tensor, moments: tuple[str, ...]
) -> Tensor:
    """[T, moments] of the whole vocabulary from :meth:`InPlacePasses.first` of each rank."""
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
