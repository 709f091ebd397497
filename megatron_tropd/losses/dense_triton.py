r"""The three passes of :mod:`~megatron_tropd.losses.dense` as Triton kernels, for GPUs.

Same functions, same formulas, same arguments, of any strides; what differs is that every logit is
read once per pass, float32 arithmetic happens in registers, and nothing of the size of the logits
is allocated. ``scratch`` is accepted and not used.

A program takes a piece of one row, ``_PIECE`` columns, a block of them at a time, with one running
sum per lane; lanes are added up when the piece is done, and the pieces of a row after that. So a
row of any length fits, and few rows still keep a GPU busy: 16 rows of 151,936 columns are 160
programs. With one program per row they would be 16, on a GPU of more than a hundred processors.

Which numbers are added in which order follows from the shapes and the constants below: nothing is
timed to choose them (Triton's autotuner) and nothing is added atomically, or a restarted run would
give other bits.

Shape suffixes: T = tokens of the chunk, v = real columns of this rank's shard, P = pieces of a row,
D = row sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tropd.losses.dense import HUGE_RATIO, SUMS, DenseSpec, RowCoefficients, Scratch

# Eight float32 of a tensor for each thread: two loads of 16 bytes, and room for seven sums.
_BLOCK = 2048
_BLOCK_PER_WARP = 256
_LEAST_BLOCK = 128
# A multiple of the block. Larger: fewer partial sums, but fewer programs where rows are few.
_PIECE = 16384


def max_and_sum_exp(logits_Tv: Tensor, scratch: Scratch) -> Tensor:
    """:func:`dense.max_and_sum_exp` in one pass. Memory traffic: 4 T v bytes."""
    num, columns = logits_Tv.shape
    if num == 0 or columns == 0:
        stats_T2 = logits_Tv.new_zeros(num, 2, dtype=torch.float32)
        stats_T2[:, 0].fill_(-torch.inf)
        return stats_T2
    pieces = triton.cdiv(columns, _PIECE)
    parts_TP2 = logits_Tv.new_empty(num, pieces, 2, dtype=torch.float32)
    _launch(_max_and_sum_exp_kernel, logits_Tv, logits_Tv, *logits_Tv.stride(), parts_TP2)
    if pieces == 1:
        return parts_TP2[:, 0]
    stats_T2 = logits_Tv.new_empty(num, 2, dtype=torch.float32)
    with torch.cuda.device_of(logits_Tv):
        _combine_kernel[(num,)](
            parts_TP2, stats_T2, pieces, PIECES=triton.next_power_of_2(pieces), num_warps=1
        )
    return stats_T2


def row_sums(
    student_Tv: Tensor,
    teacher_Tv: Tensor,
    student_norm_T2: Tensor,
    teacher_norm_T2: Tensor,
    spec: DenseSpec,
    scratch: Scratch,
) -> Tensor:
    """:func:`dense.row_sums`, all in one pass. Memory traffic: 8 T v bytes."""
    assert set(spec.sums) <= set(SUMS) and (spec.reward or "reward" not in spec.sums)
    num, columns = student_Tv.shape
    if num == 0 or columns == 0 or not spec.sums:
        return student_Tv.new_zeros(num, len(spec.sums), dtype=torch.float32)
    pieces = triton.cdiv(columns, _PIECE)
    parts_TPD = student_Tv.new_empty(num, pieces, len(spec.sums), dtype=torch.float32)
    slots = {name: spec.sums.index(name) if name in spec.sums else -1 for name in SUMS}
    _launch(
        _row_sums_kernel,
        student_Tv,
        *(student_Tv, *student_Tv.stride(), student_norm_T2.contiguous()),
        *(teacher_Tv, *teacher_Tv.stride(), teacher_norm_T2.contiguous()),
        *(_number(spec), float(spec.mix), float(1 - spec.mix)),
        parts_TPD,
        NUM=len(spec.sums),
        REWARD=spec.reward or "",
        SMALL_MIX=spec.mix <= 0.5,
        **{f"{name.upper()}_AT": slot for name, slot in slots.items()},
    )
    return parts_TPD[:, 0] if pieces == 1 else parts_TPD.sum(dim=1)


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
    """:func:`dense.write_gradient` in one pass, into float32 or bfloat16.

    Memory traffic: 12 T v bytes of float32, 8 T v where the teacher takes no part.
    """
    if student_Tv.numel() == 0:
        return
    with_teacher = teacher_norm_T2 is not None and bool(spec.reward or spec.teacher)
    if not with_teacher or teacher_Tv is None:
        teacher_Tv = student_Tv
    if not with_teacher or teacher_norm_T2 is None:
        teacher_norm_T2 = student_norm_T2
    _launch(
        _gradient_kernel,
        student_Tv,
        *(student_Tv, *student_Tv.stride(), student_norm_T2.contiguous()),
        *(teacher_Tv, *teacher_Tv.stride(), teacher_norm_T2.contiguous()),
        *(_number(spec), float(spec.mix), float(1 - spec.mix)),
        coefficients.student_T.contiguous(),
        coefficients.reward_T.contiguous(),
        coefficients.teacher_T.contiguous(),
        *(out_Tv, *out_Tv.stride()),
        REWARD=(spec.reward or "") if with_teacher else "",
        TEACHER=spec.teacher and with_teacher,
        SMALL_MIX=spec.mix <= 0.5,
    )


def _number(spec: DenseSpec) -> float:
    """The one number that a reward of its own may have: a of power, floor of trust_clip."""
    return float(spec.power if spec.reward == "power" else spec.reward_floor)


def _launch(kernel: Any, logits_Tv: Tensor, *arguments: Any, **flags: Any) -> None:
    """Run a kernel with one program for every piece of every row."""
    num, columns = logits_Tv.shape
    pieces = triton.cdiv(columns, _PIECE)
    block = min(_BLOCK, max(_LEAST_BLOCK, triton.next_power_of_2(columns)))
    warps = max(1, block // _BLOCK_PER_WARP)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(logits_Tv):
        kernel[(num * pieces,)](
            *arguments, columns, pieces, PIECE=_PIECE, BLOCK=block, num_warps=warps, **flags
        )


_HUGE_RATIO = tl.constexpr(HUGE_RATIO)
_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _max_and_sum_exp_kernel(
    logits, row_stride, column_stride, parts, columns, pieces,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, whole, stop = _piece_of_row(columns, pieces, PIECE, BLOCK)
    logits += row * row_stride
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else first, stop if TAIL else whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = _load(logits, at, column_stride, columns, TAIL)
            # Of a lane that has seen -inf only, -inf - -inf would be nan.
            rise = tl.where(value == float("-inf"), float("-inf"), value - largest)
            # The smaller of the two exponentials; the other one is 1.
            smaller = tl.exp(-tl.abs(rise))
            total = tl.where(rise > 0.0, total * smaller + 1.0, total + smaller)
            largest = tl.maximum(largest, value, propagate_nan=_ALL_NAN)
    _store_max_and_sum_exp(parts + 2 * tl.program_id(0).to(tl.int64), largest, total)


@triton.jit
def _combine_kernel(parts, stats, pieces, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PIECES)
    pair = parts + 2 * (row * pieces + at)
    largest = tl.load(pair, mask=at < pieces, other=float("-inf"))
    total = tl.load(pair + 1, mask=at < pieces, other=0.0)
    _store_max_and_sum_exp(stats + 2 * row, largest, total)


@triton.jit
def _row_sums_kernel(
    student, student_row, student_column, student_norm,
    teacher, teacher_row, teacher_column, teacher_norm,
    number, mix, rest, parts, columns, pieces,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
    NUM: tl.constexpr, REWARD: tl.constexpr, SMALL_MIX: tl.constexpr,
    TV_AT: tl.constexpr, REVERSE_KL_AT: tl.constexpr, FORWARD_KL_AT: tl.constexpr,
    STUDENT_ENTROPY_AT: tl.constexpr, TEACHER_ENTROPY_AT: tl.constexpr,
    REWARD_AT: tl.constexpr, TEACHER_TO_MIXTURE_AT: tl.constexpr,
):  # fmt: skip
    row, first, whole, stop = _piece_of_row(columns, pieces, PIECE, BLOCK)
    student, student_max, student_log_sum = _start_row(student, student_norm, row, student_row)
    teacher, teacher_max, teacher_log_sum = _start_row(teacher, teacher_norm, row, teacher_row)
    tv = tl.zeros([BLOCK], tl.float32)
    reverse_kl = tl.zeros([BLOCK], tl.float32)
    forward_kl = tl.zeros([BLOCK], tl.float32)
    student_entropy = tl.zeros([BLOCK], tl.float32)
    teacher_entropy = tl.zeros([BLOCK], tl.float32)
    reward = tl.zeros([BLOCK], tl.float32)
    teacher_to_mixture = tl.zeros([BLOCK], tl.float32)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else first, stop if TAIL else whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            # Two subtractions: max + log_sum would round to the precision of the largest logit.
            log_q = (
                _load(student, at, student_column, columns, TAIL) - student_max - student_log_sum
            )
            log_p = (
                _load(teacher, at, teacher_column, columns, TAIL) - teacher_max - teacher_log_sum
            )
            # Past the last column the logits are -inf, so that every term is 0.
            q, p = tl.exp(log_q), tl.exp(log_p)
            if TV_AT >= 0:
                tv += q - tl.minimum(p, q, propagate_nan=_ALL_NAN)
            if REVERSE_KL_AT >= 0:
                reverse_kl -= _times(q, log_p - log_q)
            if FORWARD_KL_AT >= 0:
                forward_kl += _times(p, log_p - log_q)
            if STUDENT_ENTROPY_AT >= 0:
                student_entropy -= _times(q, log_q)
            if TEACHER_ENTROPY_AT >= 0:
                teacher_entropy -= _times(p, log_p)
            if REWARD_AT >= 0:
                reward += _reward(log_q, log_p, number, mix, rest, REWARD, SMALL_MIX)
            if TEACHER_TO_MIXTURE_AT >= 0:
                teacher_to_mixture += _times(p, _over_mixture(log_p - log_q, mix, rest, SMALL_MIX))
    parts += NUM * tl.program_id(0).to(tl.int64)
    _store_sum(parts, TV_AT, tv)
    _store_sum(parts, REVERSE_KL_AT, reverse_kl)
    _store_sum(parts, FORWARD_KL_AT, forward_kl)
    _store_sum(parts, STUDENT_ENTROPY_AT, student_entropy)
    _store_sum(parts, TEACHER_ENTROPY_AT, teacher_entropy)
    _store_sum(parts, REWARD_AT, reward)
    _store_sum(parts, TEACHER_TO_MIXTURE_AT, teacher_to_mixture)


@triton.jit
def _gradient_kernel(
    student, student_row, student_column, student_norm,
    teacher, teacher_row, teacher_column, teacher_norm,
    number, mix, rest, student_factors, reward_factors, teacher_factors,
    out, out_row, out_column, columns, pieces,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
    REWARD: tl.constexpr, TEACHER: tl.constexpr, SMALL_MIX: tl.constexpr,
):  # fmt: skip
    row, first, whole, stop = _piece_of_row(columns, pieces, PIECE, BLOCK)
    student, student_max, student_log_sum = _start_row(student, student_norm, row, student_row)
    teacher, teacher_max, teacher_log_sum = _start_row(teacher, teacher_norm, row, teacher_row)
    out += row * out_row
    student_factor = tl.load(student_factors + row)
    reward_factor = tl.load(reward_factors + row)
    teacher_factor = tl.load(teacher_factors + row)
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else first, stop if TAIL else whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            log_q = (
                _load(student, at, student_column, columns, TAIL) - student_max - student_log_sum
            )
            # A factor of 0 silences its part, whatever it is: nan, or an infinite reward.
            grad = _times(student_factor, tl.exp(log_q))
            if TEACHER or REWARD != "":
                log_p = (
                    _load(teacher, at, teacher_column, columns, TAIL)
                    - teacher_max
                    - teacher_log_sum
                )
                if TEACHER:
                    grad += _times(teacher_factor, tl.exp(log_p))
                if REWARD != "":
                    grad += _times(
                        reward_factor, _reward(log_q, log_p, number, mix, rest, REWARD, SMALL_MIX)
                    )
            _store(out, at, out_column, columns, grad, TAIL)


@triton.jit
def _piece_of_row(columns, pieces, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Row of this program; of its piece the first column, the end of whole blocks, and the end."""
    program = tl.program_id(0)
    first = (program % pieces) * PIECE
    stop = tl.minimum(first + PIECE, columns)
    # int64: a row times its stride exceeds int32 from 2^31 logits on, 14,135 rows of 151,936.
    row = (program // pieces).to(tl.int64)
    return row, first, first + (stop - first) // BLOCK * BLOCK, stop


@triton.jit
def _start_row(logits, norm, row, row_stride):
    """Where a row begins, and its normaliser: the largest logit, the log of the sum."""
    return logits + row * row_stride, tl.load(norm + 2 * row), tl.load(norm + 2 * row + 1)


@triton.jit
def _load(row, at, column_stride, columns, TAIL: tl.constexpr):
    """A block of a row, -inf past its end."""
    place = row + at.to(tl.int64) * column_stride
    # Only a tail is masked: a mask that may end anywhere, as at 50,257 columns, would make every
    # load one of a single column.
    block = tl.load(place, mask=at < columns, other=float("-inf")) if TAIL else tl.load(place)
    return block.to(tl.float32)


@triton.jit
def _store(row, at, column_stride, columns, block, TAIL: tl.constexpr):
    """Write a block of a row, and nothing past its end."""
    place = row + at.to(tl.int64) * column_stride
    if TAIL:
        tl.store(place, block, mask=at < columns)
    else:
        tl.store(place, block)


@triton.jit
def _times(weights, values):
    """Weights x values, 0 where the weight is; 0 x inf would be nan."""
    return tl.where(weights == 0.0, 0.0, weights * values)


@triton.jit
def _log_mixture(ratio, mix, rest, SMALL_MIX: tl.constexpr):
    """log((b p + (1 - b) q) / q), in the form that keeps its digits: see ``dense``."""
    share = tl.exp(tl.minimum(ratio, _HUGE_RATIO, propagate_nan=_ALL_NAN))
    # A constant: chosen when the kernel runs, every column would pay for both forms.
    inside = _log1p(mix * (share - 1.0)) if SMALL_MIX else tl.log(mix * share + rest)
    return tl.where(ratio >= _HUGE_RATIO, ratio + tl.log(mix), inside)


@triton.jit
def _over_mixture(ratio, mix, rest, SMALL_MIX: tl.constexpr):
    """log(p / (b p + (1 - b) q)), likewise."""
    if SMALL_MIX:
        over = ratio - _log_mixture(ratio, mix, rest, SMALL_MIX)
        # If p / q is infinite the difference would be nan.
        over = tl.where(ratio >= _HUGE_RATIO, -tl.log(mix), over)
    else:
        inverse = tl.exp(-tl.maximum(ratio, -_HUGE_RATIO, propagate_nan=_ALL_NAN))
        over = -_log1p(rest * (inverse - 1.0))
    return over


@triton.jit
def _log1p(value):
    """log(1 + value), after Kahan: what the sum rounds off is made good by the quotient."""
    total = 1.0 + value
    return tl.where(total == 1.0, value, tl.log(total) * (value / (total - 1.0)))


@triton.jit
def _reward(log_q, log_p, number, mix, rest, REWARD: tl.constexpr, SMALL_MIX: tl.constexpr):
    """W of a block: see ``dense.Reward``."""
    q, p, ratio = tl.exp(log_q), tl.exp(log_p), log_p - log_q
    if REWARD == "log_ratio":
        reward = _times(q, ratio)
    elif REWARD == "mixture":
        reward = _times(q, _log_mixture(ratio, mix, rest, SMALL_MIX))
    elif REWARD == "power":
        reward = q * (tl.exp(number * log_p) - tl.exp(number * log_q))
    else:
        tl.static_assert(REWARD == "trust" or REWARD == "trust_clip")
        inside = tl.minimum(p, q, propagate_nan=_ALL_NAN)
        reward = _times(inside, ratio)
        if REWARD == "trust_clip":
            reward += _times(q - inside, tl.maximum(ratio, number, propagate_nan=_ALL_NAN))
    return reward


@triton.jit
def _store_sum(parts, AT: tl.constexpr, lanes):
    """Add the lanes up, where the sum is asked for at all."""
    if AT >= 0:
        tl.store(parts + AT, tl.sum(lanes, axis=0))


@triton.jit
def _store_max_and_sum_exp(pair, largest, total):
    """Largest of all lanes, and the sum of their exponentials relative to that one."""
    # tl.max passes over nan.
    any_nan = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    largest_of_all = tl.where(any_nan, float("nan"), tl.max(largest, axis=0))
    # -inf - -inf would be nan; any finite shift gives the right sum, 0.
    shift = tl.where(largest_of_all == float("-inf"), 0.0, largest_of_all)
    tl.store(pair, largest_of_all)
    tl.store(pair + 1, tl.sum(total * tl.exp(largest - shift), axis=0))
