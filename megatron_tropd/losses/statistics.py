"""What the losses and the metrics need to know about student and teacher at each token.

Both models' logits are read once, a chunk at a time; everything that has to cross ranks is packed
into one all-gather and at most one all-reduce per chunk.

Shape suffixes: T = tokens of the chunk, V = whole vocabulary, v = real columns of this rank's
shard, K = top-k, D = row sums, R = ranks of the group. p = teacher, q = student.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_tropd.config.loss import TEACHER, Powers
from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.dense import Scratch
from megatron_tropd.losses.dense_inplace import combine
from megatron_tropd.losses.passes import Passes, max_and_sum_exp
from megatron_tropd.losses.signals import ReferencedTopKSignal, TopKSignal
from megatron_tropd.losses.vocab_parallel import Shard

METRICS = ("tv", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")
"""Row sums that describe the pair whatever the loss."""


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token values, the same on every rank of the group; natural logarithms."""

    student_normaliser_T2: Tensor
    """[T, 2] float32 what ``vocab_parallel.normalise`` subtracts from the student's logits."""
    teacher_normaliser_T2: Tensor
    """[T, 2] float32 the target's; [T, 0] where its logits are not at hand."""
    student_logprob_T: Tensor
    """[T] float32 log q of the token in the trajectory."""
    sampled_share_T: Tensor
    """[T] float32 log of what q gives this id of its event (``merged``); 0 for most tokens."""
    teacher_logprob_T: Tensor
    """[T] float32 log p of the token in the trajectory."""
    reference_logprob_T: Tensor
    """[T] float32 log p_ref of it; [T, 0] if the loss does not read it."""
    log_mass_T: Tensor
    """[T] float32 log of the sum over the vocabulary of what ``Needs.target`` is proportional to;
    0 of the teacher itself."""
    topk_ids_TK: Tensor
    """[T, K] int64 the most likely ids of the target, or of the student (``student_top_k``)."""
    topk_student_logprobs_TK: Tensor
    """[T, K] float32 log q of those."""
    topk_teacher_logprobs_TK: Tensor
    """[T, K] float32 the target's log-probs of those."""
    sums_TD: Tensor
    """[T, D] float32 sums over the whole vocabulary, columns as in ``sum_names``."""
    sum_names: tuple[str, ...]
    """[D] names from ``dense.SUMS``."""

    @property
    def log_ratio_T(self) -> Tensor:
        """[T] log p(x) - log q(x); 0 for a token that neither model writes."""
        excluded_T = (self.teacher_logprob_T == -torch.inf) & (self.student_logprob_T == -torch.inf)
        ratio_T = self.teacher_logprob_T - self.student_logprob_T
        return torch.where(excluded_T, 0.0, ratio_T)

    def sum_of(self, name: str) -> Tensor:
        """[T] float32 the sum of that name."""
        return self.sums_TD[:, self.sum_names.index(name)]

    def divergences(self) -> dict[str, Tensor]:
        """[T] float32 each: those of ``METRICS`` that were asked for."""
        return {name: self.sum_of(name) for name in METRICS if name in self.sum_names}

    def rows(self, rows: slice) -> "TokenStatistics":
        """The same of some tokens."""
        cut = {name: getattr(self, name)[rows] for name in _TENSORS}
        return TokenStatistics(**cut, sum_names=self.sum_names)

    @staticmethod
    def concatenate(parts: Sequence["TokenStatistics"]) -> "TokenStatistics":
        """Chunks of one sequence of tokens, joined."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return TokenStatistics(**joined, sum_names=parts[0].sum_names)


_TENSORS = tuple(f.name for f in fields(TokenStatistics) if f.name != "sum_names")


@dataclass(frozen=True)
class Target:
    """What the student is compared with: ``Needs.target``, and whether log p_ref is read."""

    powers: Powers = TEACHER
    reads_reference: bool = False

    @property
    def is_teacher(self) -> bool:
        """Whether it is the teacher itself."""
        return self.powers == TEACHER

    def write(self, student_Tv: Tensor, teacher_Tv: Tensor, reference_Tv: Tensor | None) -> None:
        """Turn the teacher's logits into the target's; a column that one excludes stays excluded.

        Args:
            student_Tv: [T, v] float32 logits.
            teacher_Tv: [T, v] float32 logits, overwritten.
            reference_Tv: [T, v] float32 logits, if its power is not 0.
        """
        powers = self.powers
        if not powers.teacher:  # 0 x -inf would be nan
            teacher_Tv.zero_()
        excluded_Tv = teacher_Tv == -torch.inf
        teacher_Tv.mul_(powers.teacher)
        if powers.reference and reference_Tv is not None:
            excluded_Tv |= reference_Tv == -torch.inf
            teacher_Tv.add_(reference_Tv, alpha=powers.reference)
        if powers.student:
            excluded_Tv |= student_Tv == -torch.inf
            teacher_Tv.add_(student_Tv, alpha=powers.student)
        teacher_Tv.masked_fill_(excluded_Tv, -torch.inf)


def own_part(logits_Tv: Tensor, ids_T: Tensor, shard: Shard, scratch: Scratch) -> Tensor:
    """[T, 3] this shard's part of a model's log-prob of the tokens; see :func:`_own_logprobs`."""
    picked_T1 = vp.pick_columns(logits_Tv, ids_T.unsqueeze(-1), shard)
    return torch.cat([picked_T1, max_and_sum_exp(logits_Tv, scratch)], dim=-1)


def _own_logprobs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """([T] log-prob of the token, [T] log of the sum of exponentials) of each [R, T, 3]."""
    found = []
    for part_RT3 in parts:
        norm_T2 = vp.combine_normalisers(part_RT3[..., 1:])
        logprob_T1 = vp.normalise(part_RT3[..., :1].sum(dim=0), norm_T2)
        found.append((logprob_T1.squeeze(-1), norm_T2.sum(dim=-1)))
    return found


Waiting = Generator[None, None, TokenStatistics]
"""Yields while a collective is under way, so that the caller may compute something else."""


def compare(
    student_Tv: Tensor,
    teacher_Tv: Tensor,
    passes: Passes,
    ids_T: Tensor,
    k: int,
    shard: Shard,
    own: Sequence[Tensor],
    target: Target,
    *,
    by_student: bool = False,
) -> Waiting:
    """Statistics with both distributions at hand.

    Args:
        student_Tv: [T, v] float32 real columns.
        teacher_Tv: [T, v] float32 the same columns of the target.
        passes: over these two.
        ids_T: [T] int64 tokens of the trajectory.
        k: size of the top-k; 0: none.
        shard: where the columns lie.
        own: [T, 3] each (:func:`own_part`): of the reference, and of a teacher that is not the
            target itself, in this order.
        target: which target.
        by_student: the top-k is the student's, not the target's.

    Returns:
        A generator that yields at each of its waits and returns the statistics.

    Collectives: 1 all-gather of [T, 6 + 3 K + moments] int32, with 3 more columns for each of
    ``own``; 1 all-reduce (SUM) of [T, D] float32 where D of the sums are no moments. On a CPU those
    that need both normalisers (the trust region, JSD, at most 3); with the passes of a GPU, which
    have no moments, all of them, at most 7.
    """
    ids_T1 = ids_T.unsqueeze(-1)
    no_keys = ids_T.new_empty(len(ids_T), 0)
    ranked_Tv, other_Tv = (student_Tv, teacher_Tv) if by_student else (teacher_Tv, student_Tv)
    keys_TK = vp.pack_top_k(ranked_Tv, k, start=shard.start) if k else no_keys
    _, candidates_TK = vp.unpack_top_k(keys_TK)
    wanted = (student_Tv, ids_T1), (teacher_Tv, ids_T1), (other_Tv, candidates_TK)
    picked_Tn = torch.cat([vp.pick_columns(*columns, shard) for columns in wanted], dim=-1)
    floats_Tn = torch.cat([*own, picked_Tn, passes.first()], dim=-1)
    # Bits travel as they are, so that one collective carries floats and keys.
    bits_Tn = torch.cat([keys_TK.view(torch.int32), floats_Tn.view(torch.int32)], dim=-1)
    gathering = vp.AllGather(bits_Tn, group=shard.group)
    yield
    bits_RTn = gathering.wait()
    keys_RTK = _as(torch.int64, bits_RTn[..., : 2 * k])
    floats_RTn = _as(torch.float32, bits_RTn[..., 2 * k :])
    stats_at = 3 * len(own) + 2 + k
    sizes = [3 * len(own), 2, k, floats_RTn.shape[-1] - stats_at]
    own_RTn, sampled_RT2, other_RTK, stats_RTn = floats_RTn.split(sizes, -1)
    student_norm_T2 = vp.combine_normalisers(stats_RTn[..., 0:2])
    teacher_norm_T2 = vp.combine_normalisers(stats_RTn[..., 2:4])
    moments_TD = combine(stats_RTn, student_norm_T2, teacher_norm_T2, passes.moments)
    student_x_T1, teacher_x_T1 = sampled_RT2.sum(dim=0).split(1, dim=-1)
    teacher_logprob_T = vp.normalise(teacher_x_T1, teacher_norm_T2).squeeze(-1)
    teacher_logprob_T, reference_logprob_T, log_mass_T = _of_target(
        own_RTn, target, teacher_logprob_T, student_norm_T2, teacher_norm_T2
    )
    merged_TK, other_TK = vp.merge_top_k(keys_RTK, other_RTK)
    ranked_TK, topk_ids_TK = vp.unpack_top_k(merged_TK)
    student_TK, teacher_TK = (ranked_TK, other_TK) if by_student else (other_TK, ranked_TK)
    reducing = vp.AllReduceSum(passes.second(student_norm_T2, teacher_norm_T2), group=shard.group)
    if passes.sums:
        yield
    return TokenStatistics(
        student_normaliser_T2=student_norm_T2,
        teacher_normaliser_T2=teacher_norm_T2,
        student_logprob_T=vp.normalise(student_x_T1, student_norm_T2).squeeze(-1),
        sampled_share_T=torch.zeros_like(student_x_T1[:, 0]),
        teacher_logprob_T=teacher_logprob_T,
        reference_logprob_T=reference_logprob_T,
        log_mass_T=log_mass_T,
        topk_ids_TK=topk_ids_TK,
        topk_student_logprobs_TK=vp.normalise(student_TK, student_norm_T2),
        topk_teacher_logprobs_TK=vp.normalise(teacher_TK, teacher_norm_T2),
        sums_TD=torch.cat([moments_TD, reducing.wait()], dim=-1),
        sum_names=passes.moments + passes.sums,
    )


def _of_target(
    own_RTn: Tensor,
    target: Target,
    target_logprob_T: Tensor,
    student_norm_T2: Tensor,
    target_norm_T2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of teacher and reference, and the log-mass of a target that is neither.

    Args:
        own_RTn: [R, T, 3 per model] of all ranks (:func:`own_part`).
        target: which target.
        target_logprob_T: [T] of the token under it.
        student_norm_T2: [T, 2] normaliser of the student.
        target_norm_T2: [T, 2] that of the target.

    Returns:
        [T] of the teacher; [T] of the reference, [T, 0] if nobody reads it; [T] log-mass.
    """
    known = _own_logprobs(own_RTn.split(3, dim=-1)) if own_RTn.shape[-1] else []
    reference_logprob_T = known[0][0] if target.reads_reference else student_norm_T2[:, :0]
    if target.is_teacher:
        return target_logprob_T, reference_logprob_T, torch.zeros_like(target_logprob_T)
    # Without a reference its power is 0, and what stands in its place is not read.
    sums = known[-1][1], known[0][1], student_norm_T2.sum(dim=-1)
    log_mass_T = target_norm_T2.sum(dim=-1)
    for power, log_sum_T in zip(target.powers, sums, strict=True):
        log_mass_T = log_mass_T - power * log_sum_T if power else log_mass_T
    return known[-1][0], reference_logprob_T, log_mass_T


def _as(dtype: torch.dtype, bits: Tensor) -> Tensor:
    if bits.shape[-1] == 0:
        return bits.to(dtype)
    # Not ``contiguous``: it leaves odd strides of single rows, which no wider type can view.
    return bits.clone(memory_format=torch.contiguous_format).view(dtype)


def look_up(
    student_Tv: Tensor,
    passes: Passes,
    ids_T: Tensor,
    signal: TopKSignal,
    rows: slice,
    k: int,
    shard: Shard,
) -> Waiting:
    """Statistics where the teacher's part is given.

    Args:
        student_Tv: [T, v] float32 real columns.
        passes: over these.
        ids_T: [T] int64 tokens of the trajectory.
        signal: the teacher, at all positions.
        rows: which of them these T are.
        k: how much of the signal's top-k to use.
        shard: where the columns lie.

    Returns:
        A generator that yields at its one wait and returns the statistics.

    Collectives: 1 all-gather of [T, 3 + K] float32.
    """
    topk_ids_TK = signal.topk_ids_TK[rows, :k]
    lookups_TK = torch.cat([ids_T.unsqueeze(-1), topk_ids_TK], dim=-1)
    picked_TK = vp.pick_columns(student_Tv, lookups_TK, shard)
    gathering = vp.AllGather(torch.cat([picked_TK, passes.first()], dim=-1), group=shard.group)
    yield
    packed_RTn = gathering.wait()
    student_norm_T2 = vp.combine_normalisers(packed_RTn[..., -2:])
    logprobs_TK = vp.normalise(packed_RTn[..., :-2].sum(dim=0), student_norm_T2)
    reference_logprob_T = student_norm_T2[:, :0]
    if isinstance(signal, ReferencedTopKSignal):
        reference_logprob_T = signal.reference_logprobs_T[rows].float()
    return TokenStatistics(
        student_normaliser_T2=student_norm_T2,
        teacher_normaliser_T2=student_norm_T2[:, :0],
        student_logprob_T=logprobs_TK[:, 0],
        sampled_share_T=torch.zeros_like(logprobs_TK[:, 0]),
        teacher_logprob_T=signal.sampled_logprobs_T[rows].float(),
        reference_logprob_T=reference_logprob_T,
        log_mass_T=torch.zeros_like(logprobs_TK[:, 0]),
        topk_ids_TK=topk_ids_TK,
        topk_student_logprobs_TK=logprobs_TK[:, 1:],
        topk_teacher_logprobs_TK=signal.topk_logprobs_TK[rows, :k].float(),
        sums_TD=student_norm_T2[:, :0],
        sum_names=(),
    )
