"""Ids that are one event, such as the ends of a response that two models prefer.

The event has the probability of its ids together: its logit, the log of the sum of their
exponentials, takes the place of the first id, and the others are excluded. So every statistic and
every loss is that of a vocabulary in which the ids are one. The gradient of the event's logit is
shared among its ids as the student shares the event's probability among them.

Shape suffixes: t = tokens of the chunk, v = real columns of this rank's shard, m = merged ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.dense import DenseSpec, RowCoefficients, Scratch
from megatron_tropd.losses.passes import passes_for
from megatron_tropd.losses.statistics import TokenStatistics
from megatron_tropd.losses.terms import Term, times
from megatron_tropd.losses.vocab_parallel import Shard


def with_one_id(ids_T: Tensor, merged: Sequence[int]) -> Tensor:
    """The tokens with every merged id replaced by the first."""
    for other in merged[1:]:
        ids_T = torch.where(ids_T == other, merged[0], ids_T)
    return ids_T


@dataclass(frozen=True)
class Event:
    """What the merged ids are in one chunk, the same on every rank."""

    ids: tuple[int, ...]
    """[m] the first stands for all."""
    student_t1: Tensor
    """[t, 1] float32 the student's logit."""
    teacher_t1: Tensor
    """[t, 1] float32 the teacher's."""
    reference_t1: Tensor | None
    """[t, 1] float32 the reference's, if the loss reads it over the vocabulary."""
    log_share_tm: Tensor
    """[t, m] float32 log of the student's probability of each id, given the event."""

    def log_share_of(self, ids_t: Tensor) -> Tensor:
        """[t] log share of the tokens that were sampled; 0 for those that are no merged id."""
        found_t = torch.zeros_like(self.log_share_tm[:, 0])
        for column, number in enumerate(self.ids):
            found_t = torch.where(ids_t == number, self.log_share_tm[:, column], found_t)
        return found_t

    def share_gradient(
        self,
        out_tv: Tensor,
        ids_t: Tensor,
        term: Term,
        statistics: TokenStatistics,
        coefficients: RowCoefficients,
        spec: DenseSpec,
        shard: Shard,
    ) -> None:
        """Write the gradient of the merged ids that this rank holds; no collectives.

        Args:
            out_tv: [t, v] the gradient, in which these columns are overwritten.
            ids_t: [t] the tokens, merged ids replaced by the first.
            term: their loss.
            statistics: of the tokens.
            coefficients: of the dense part.
            spec: which reward.
            shard: where the columns lie.
        """
        needs_teacher = spec.reward is not None or spec.teacher
        norm_T2 = statistics.teacher_normaliser_T2 if needs_teacher else None
        scratch = Scratch(1, out_tv.device)
        passes = passes_for(self.student_t1.clone(), self.teacher_t1.clone(), spec, scratch)
        passes.prepare()
        grad_t1 = torch.empty_like(self.student_t1)
        norms = (statistics.student_normaliser_T2, norm_T2)
        passes.write_gradient(*norms, coefficients, grad_t1)
        first = self.ids[0]
        pushed_t = torch.where(ids_t == first, term.sampled_T, 0.0)
        in_top_tK = statistics.topk_ids_TK == first
        grad_t = grad_t1[:, 0] + pushed_t + torch.where(in_top_tK, term.topk_TK, 0.0).sum(-1)
        for column, number in enumerate(self.ids):
            if shard.start <= number < shard.stop:
                shared_t = times(grad_t, self.log_share_tm[:, column].exp())
                out_tv[:, number - shard.start] = shared_t.to(out_tv.dtype)


def merge(models: Sequence[Tensor], ids: Sequence[int], shard: Shard) -> Event:
    """Make one event of some columns, in place.

    Args:
        models: [t, v] float32 logits each of student, teacher and perhaps reference; the ids'
            columns are overwritten.
        ids: at least two, of the whole vocabulary.
        shard: where the columns lie.

    Returns:
        The event.

    Collectives: 1 all-reduce (SUM) of [t, n m] float32 of n models.
    """
    mine = [(at, n - shard.start) for at, n in enumerate(ids) if shard.start <= n < shard.stop]
    picked_ntm = models[0].new_zeros(len(models), len(models[0]), len(ids))
    for model, logits_tv in enumerate(models):
        for at, column in mine:
            picked_ntm[model, :, at] = logits_tv[:, column]
    picked_ntm = vp.all_reduce_sum(picked_ntm, group=shard.group)
    event_nt1 = picked_ntm.logsumexp(dim=-1, keepdim=True)
    for model, logits_tv in enumerate(models):
        for at, column in mine:
            logits_tv[:, column] = -torch.inf if at else event_nt1[model, :, 0]
    # Of an event that the student excludes no id has a share.
    nothing_t1 = event_nt1[0] == -torch.inf
    share_tm = torch.where(nothing_t1, -torch.inf, picked_ntm[0] - event_nt1[0])
    reference_t1 = event_nt1[2] if len(models) > 2 else None
    return Event(tuple(ids), event_nt1[0], event_nt1[1], reference_t1, share_tm)
