"""What the losses and the metrics need to know about student and teacher at each token.

Both models are read once, some rows at a time; everything that has to cross ranks is packed into
one all-gather and one all-reduce per chunk of rows.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k, R = ranks of
the group. p = teacher, q = student.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.signals import TOP_K, FullSignal, TeacherSignal, TopKSignal

_CHUNK_BYTES = 64 * 2**20
# About ten float32 buffers of [rows, v] are alive at once: both models' logits, log-probs and
# probabilities, and the int64 keys of the top-k.
_BYTES_PER_COLUMN = 40

_DIVERGENCES = ("tv", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy")


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token values, the same on every rank of the group; natural logarithms."""

    student_normaliser_T2: Tensor
    """[T, 2] float32 what ``vocab_parallel.normalise`` subtracts from the student's logits."""
    student_logprob_T: Tensor
    """[T] float32 log q of the token in the trajectory."""
    teacher_logprob_T: Tensor
    """[T] float32 log p of the token in the trajectory."""
    topk_ids_TK: Tensor
    """[T, K] int64 the teacher's most likely ids; K = 0 where the signal has no top-k."""
    topk_student_logprobs_TK: Tensor
    """[T, K] float32 log q of those."""
    topk_teacher_logprobs_TK: Tensor
    """[T, K] float32 log p of those."""
    divergences_TD: Tensor
    """[T, D] float32, columns as in ``divergences``; D = 0 where the signal is not full."""

    def divergences(self) -> dict[str, Tensor]:
        """[T] float32 each: tv, reverse_kl, forward_kl, student_entropy, teacher_entropy."""
        if self.divergences_TD.shape[-1] == 0:
            return {}
        return dict(zip(_DIVERGENCES, self.divergences_TD.unbind(dim=-1), strict=True))


def chunk_rows(width: int, chunk: int | None = None) -> int:
    """Rows handled at a time, so that temporaries stay within about 64 MiB.

    Args:
        width: v, columns of a shard.
        chunk: the caller's own choice, if any.

    Returns:
        At least 1.

    Raises:
        ValueError: ``chunk`` is below 1.
    """
    if chunk is None:
        return max(1, _CHUNK_BYTES // (_BYTES_PER_COLUMN * max(width, 1)))
    if chunk < 1:
        raise ValueError(f"Expected chunk of at least 1 row, found {chunk}. None chooses one.")
    return chunk


def token_statistics(
    student_logits_Tv: Tensor,
    ids_T: Tensor,
    signal: TeacherSignal,
    *,
    k: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    chunk: int | None = None,
) -> TokenStatistics:
    """Everything the losses and metrics need, without a gradient.

    Args:
        student_logits_Tv: [T, v] any float dtype, this rank's shard. Not modified.
        ids_T: [T] int64 tokens of the trajectory.
        signal: the teacher at the same T positions.
        k: size of the teacher's top-k.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.
        chunk: rows at a time; None: as many as fit.

    Returns:
        The statistics.

    Collectives: per chunk of t rows, 1 all-gather of at most [t, K + 2] int64 and 1 all-reduce
    (SUM) of at most [t, 2 + K + 5] float32.
    """
    num = student_logits_Tv.shape[0]
    step = chunk_rows(student_logits_Tv.shape[-1], chunk)
    parts = []
    # One chunk of no rows when T = 0, so that shapes and dtypes come out the usual way.
    for begin in range(0, max(num, 1), step):
        rows = slice(begin, min(begin + step, num))
        columns_Tv, start = vp.real_columns(
            student_logits_Tv[rows], vocab_size=vocab_size, group=group
        )
        if isinstance(signal, FullSignal):
            teacher_Tv, teacher_start = vp.real_columns(
                signal.logits(rows), vocab_size=vocab_size, group=group
            )
            if (teacher_start, teacher_Tv.shape) != (start, columns_Tv.shape):
                raise ValueError(
                    f"Expected teacher logits of columns {start}..{start + columns_Tv.shape[-1]} "
                    f"like the student's, found {teacher_start}.."
                    f"{teacher_start + teacher_Tv.shape[-1]}. Pad both vocabularies to one width."
                )
            parts.append(_compare(columns_Tv, teacher_Tv, ids_T[rows], k, start, group))
        else:
            assert isinstance(signal, TopKSignal)
            parts.append(_look_up(columns_Tv, ids_T[rows], signal, rows, k, start, group))
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compare(
    student_Tv: Tensor,
    teacher_Tv: Tensor,
    ids_T: Tensor,
    k: int,
    start: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Fields of :class:`TokenStatistics` with both distributions at hand."""
    stats_T4 = torch.cat([vp.max_and_sum_exp(student_Tv), vp.max_and_sum_exp(teacher_Tv)], dim=-1)
    keys_TK = vp.pack_top_k(teacher_Tv, k, start=start)
    # Two float32 travel in the place of one int64 beside the keys.
    packed_RTn = vp.all_gather(torch.cat([stats_T4.view(torch.int64), keys_TK], -1), group=group)
    stats_RT4 = packed_RTn[..., :2].contiguous().view(torch.float32)
    student_norm_T2 = vp.combine_normalisers(stats_RT4[..., :2])
    teacher_norm_T2 = vp.combine_normalisers(stats_RT4[..., 2:])
    topk_teacher_TK, topk_ids_TK = vp.unpack_top_k(vp.merge_top_k(packed_RTn[..., 2:]))

    sampled_ids_T1 = ids_T.unsqueeze(-1)
    lookups_TK = torch.cat([sampled_ids_T1, topk_ids_TK], dim=-1)
    packed_Tn = torch.cat(
        [
            vp.pick_columns(teacher_Tv, sampled_ids_T1, start=start),
            vp.pick_columns(student_Tv, lookups_TK, start=start),
            _divergence_sums(
                vp.normalise(student_Tv, student_norm_T2),
                vp.normalise(teacher_Tv, teacher_norm_T2),
            ),
        ],
        dim=-1,
    )
    teacher_T1, student_TK, divergences_TD = vp.all_reduce_sum(packed_Tn, group=group).split(
        [1, 1 + k, len(_DIVERGENCES)], dim=-1
    )
    student_logprobs_TK = vp.normalise(student_TK, student_norm_T2)
    return (
        student_norm_T2,
        student_logprobs_TK[:, 0],
        vp.normalise(teacher_T1, teacher_norm_T2).squeeze(-1),
        topk_ids_TK,
        student_logprobs_TK[:, 1:],
        vp.normalise(topk_teacher_TK, teacher_norm_T2),
        divergences_TD,
    )


def _divergence_sums(log_q_Tv: Tensor, log_p_Tv: Tensor) -> Tensor:
    """This shard's part of the columns of ``TokenStatistics.divergences_TD``."""
    q_Tv, p_Tv = log_q_Tv.exp(), log_p_Tv.exp()

    def expectation(weights_Tv: Tensor, values_Tv: Tensor) -> Tensor:
        # 0 log 0 = 0, also where the other distribution is 0 as well.
        return torch.where(weights_Tv > 0, weights_Tv * values_Tv, 0.0).sum(dim=-1)

    ratio_Tv = log_q_Tv - log_p_Tv
    return torch.stack(
        [
            0.5 * (p_Tv - q_Tv).abs().sum(dim=-1),
            expectation(q_Tv, ratio_Tv),
            -expectation(p_Tv, ratio_Tv),
            -expectation(q_Tv, log_q_Tv),
            -expectation(p_Tv, log_p_Tv),
        ],
        dim=-1,
    )


def _look_up(
    student_Tv: Tensor,
    ids_T: Tensor,
    signal: TopKSignal,
    rows: slice,
    k: int,
    start: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Fields of :class:`TokenStatistics` where the teacher's part is given."""
    k = k if TOP_K in signal.provides else 0
    topk_ids_TK = signal.topk_ids_TK[rows, :k]
    stats_RT2 = vp.all_gather(vp.max_and_sum_exp(student_Tv), group=group)
    student_norm_T2 = vp.combine_normalisers(stats_RT2)
    lookups_TK = torch.cat([ids_T.unsqueeze(-1), topk_ids_TK], dim=-1)
    picked_TK = vp.all_reduce_sum(vp.pick_columns(student_Tv, lookups_TK, start=start), group=group)
    logprobs_TK = vp.normalise(picked_TK, student_norm_T2)
    return (
        student_norm_T2,
        logprobs_TK[:, 0],
        signal.sampled_logprobs_T[rows].float(),
        topk_ids_TK,
        logprobs_TK[:, 1:],
        signal.topk_logprobs_TK[rows, :k].float(),
        student_norm_T2.new_zeros(student_norm_T2.shape[0], 0),
    )
