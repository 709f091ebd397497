"""Tokens a chunk at a time: logits of both models in buffers that every chunk reuses.

Shape suffixes: T = all tokens, t = tokens of a chunk, v = real columns of this rank's shard,
K = top-k.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.dense import DenseSpec, RowCoefficients, Scratch
from megatron_tropd.losses.merged import Event, merge
from megatron_tropd.losses.passes import Passes, needs_scratch, passes_for
from megatron_tropd.losses.signals import (
    FullSignal,
    HiddenStatesSignal,
    TeacherSignal,
    TopKSignal,
)
from megatron_tropd.losses.statistics import (
    Target,
    TokenStatistics,
    Waiting,
    compare,
    look_up,
    own_part,
)
from megatron_tropd.losses.terms import Term
from megatron_tropd.losses.vocab_parallel import Shard

# Each chunk visits the output layer and its gradient once. Measured on CPU with 32,768 columns: the
# products of 256 rows, which this budget holds, take 1.07 times as long as in the fastest tiling,
# those of 128 rows 1.14 times. A GPU needs thousands of rows.
_MEMORY_MIB = {"cpu": 72}
_MEMORY_MIB_ELSEWHERE = 4096
_CACHE_LINE = 16  # float32
_ALIGNED = 64  # elements: rows that start at multiples of 128 bytes load 16 bytes at a time


@dataclass(frozen=True)
class Pair:
    """Student and teacher at T tokens, and what is to be known of them."""

    student: FullSignal
    """Where the student's logits come from; the same interface as a teacher's."""
    teacher: TeacherSignal
    ids_T: Tensor
    """[T] int64 the token in the trajectory."""
    k: int
    """Size of the top-k; 0: none."""
    spec: DenseSpec
    shard: Shard
    device: torch.device
    sampled_T: Tensor | None = None
    """[T] int64 the token itself, if ``ids_T`` has merged ids replaced; None: ``ids_T``."""
    merge_ids: tuple[int, ...] = ()
    """Ids that are one event (``merged``)."""
    memory_mib: int | None = None
    """Budget of the chunk buffers; None: 72 MiB on CPU, 4 GiB on GPUs."""
    by_student: bool = False
    """Whether the top-k is the student's, not the teacher's."""
    reference: FullSignal | None = None
    """What the teacher is measured against; None: the loss does not read it over the vocabulary."""
    target: Target = field(default_factory=Target)

    @property
    def models(self) -> int:
        """Whose logits a chunk holds."""
        return 1 + self.full + (self.reference is not None)

    @property
    def full(self) -> bool:
        """Whether the teacher's logits are at hand."""
        return isinstance(self.teacher, FullSignal)


@dataclass(frozen=True)
class Chunk:
    """Logits and statistics of some rows; the buffers belong to the next chunk afterwards."""

    rows: slice
    student_tv: Tensor
    """[t, v] float32 buffer of the student's logits."""
    teacher_tv: Tensor | None
    """[t, v] float32 buffer of the target's; None: not at hand."""
    rounded_tv: Tensor | None
    """[t, v] buffer of a gradient in lower precision; None: it takes the place of the student's
    logits."""
    passes: Passes
    statistics: TokenStatistics
    event: Event | None = None
    """Of merged ids; None: there are none."""

    def gradient(self, ids_t: Tensor, term: Term, spec: DenseSpec, shard: Shard) -> Tensor:
        """Gradient of the summed term with respect to the student's logits; may overwrite these.

        Args and result as of :meth:`_gradient`, with the gradient of an event on all its ids.
        """
        out_tv = self._gradient(ids_t, term, spec, shard)
        if self.event is not None:
            known = (self.statistics, self._coefficients(term, spec), spec, shard)
            self.event.share_gradient(out_tv, ids_t, term, *known)
        return out_tv

    def _coefficients(self, term: Term, spec: DenseSpec) -> RowCoefficients:
        return RowCoefficients(
            student_T=-term.mass(self.statistics, spec),
            reward_T=term.reward_T,
            teacher_T=term.teacher_T,
        )

    def _gradient(self, ids_t: Tensor, term: Term, spec: DenseSpec, shard: Shard) -> Tensor:
        """Gradient with respect to the logits as the passes saw them.

        Args:
            ids_t: [t] the tokens.
            term: their loss.
            spec: which reward.
            shard: where the columns lie.

        Returns:
            [t, v] float32, or rounded once to the precision of ``rounded_tv``.
        """
        statistics, rounded_tv = self.statistics, self.rounded_tv
        out_tv = self.student_tv if rounded_tv is None else rounded_tv
        coefficients = self._coefficients(term, spec)
        needs_teacher = spec.reward is not None or spec.teacher
        norm_T2 = statistics.teacher_normaliser_T2 if needs_teacher else None
        known = (statistics.student_normaliser_T2, norm_T2, coefficients)
        self.passes.write_gradient(*known, out_tv)
        if not shard.real:
            return out_tv
        local_tK, mine_tK, pushes_tK = _sparse(ids_t, term, statistics, shard)
        pushes_tK = torch.where(mine_tK, pushes_tK, 0.0)
        if rounded_tv is None:
            return _add_in_order(out_tv, local_tK, pushes_tK)
        dense_tK = torch.empty_like(pushes_tK)
        self._picked(local_tK, spec).write_gradient(*known, dense_tK)
        # Nobody reads the student's logits any more. In their place a column gets everything that
        # is pushed at it, however often it is named; the first one is for those held elsewhere.
        sums_tv = self.student_tv.scatter_(-1, local_tK, dense_tK)
        _add_in_order(sums_tv, local_tK, pushes_tK)
        return out_tv.scatter_(-1, local_tK, sums_tv.gather(-1, local_tK).to(out_tv.dtype))

    def _picked(self, local_tK: Tensor, spec: DenseSpec) -> Passes:
        """The passes over a few columns alone.

        Where the student has learned, their own part nearly cancels the dense one: rounded one by
        one, the two would not.
        """
        teacher_tv, scratch = self.teacher_tv, Scratch(local_tK.shape[-1], local_tK.device)
        teacher_tK = None if teacher_tv is None else teacher_tv.gather(-1, local_tK)
        return passes_for(self.student_tv.gather(-1, local_tK), teacher_tK, spec, scratch)


def _add_in_order(out_tv: Tensor, local_tK: Tensor, pushes_tK: Tensor) -> Tensor:
    """``out_tv`` plus the pushes: the token's column first, for it may be in the top-k, too.

    A GPU adds what one call has for a column in any order, and other bits would come out.
    """
    for part in (slice(0, 1), slice(1, None)):
        out_tv.scatter_add_(-1, local_tK[:, part], pushes_tK[:, part])
    return out_tv


def _sparse(
    ids_t: Tensor, term: Term, statistics: TokenStatistics, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that a term pushes by themselves: the token and the top-k.

    Returns:
        ([t, 1 + K] index of the column here, whether it is here, what is added to its gradient).
    """
    ids_tK = torch.cat([ids_t.unsqueeze(-1), statistics.topk_ids_TK], dim=-1)
    pushes_tK = torch.cat([term.sampled_T.unsqueeze(-1), term.topk_TK], dim=-1)
    return *vp.local_ids(ids_tK, start=shard.start, columns=shard.real), pushes_tK


def for_each_chunk(pair: Pair, use: Callable[[Chunk], None]) -> None:
    """Logits and statistics of every chunk, in order.

    Where it helps (:func:`overlaps`) two chunks are under way: while the collectives of one run,
    the products of the other are computed.

    Args:
        pair: the models and tokens.
        use: called with each chunk; may overwrite its logits.

    Collectives: per chunk of t rows, those of ``statistics.compare`` or ``look_up``.
    """
    overlap = overlaps(pair)
    buffers = _Buffers(pair, count=2 if overlap else 1)
    previous: Iterator[None] = iter(())
    for number, rows in enumerate(buffers.chunks(len(pair.ids_T))):
        current = _steps(pair, rows, buffers, number, use)
        if not overlap:
            _finish(current)
            continue
        next(current, None)  # logits, first collective under way
        _finish(previous)  # second collective over, gradient
        next(current, None)  # row sums, second collective under way
        previous = current
    _finish(previous)


def overlaps(pair: Pair) -> bool:
    """Whether two chunks share the budget so that collectives hide behind products.

    Not on a CPU: half the rows a chunk cost more there than the collectives, measured at TP 2 over
    gloo.
    """
    group = pair.shard.group
    return group is not None and group.size() > 1 and pair.device.type != "cpu"


def _finish(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def gradient_chunks(pair: Pair, statistics: TokenStatistics) -> Iterator[Chunk]:
    """The chunks again, for a gradient made later. No collectives, unless ids are merged.

    Args:
        pair: as in the first pass.
        statistics: what came of it, for all T tokens.
    """
    buffers = _Buffers(pair, count=1)
    for rows in buffers.chunks(len(pair.ids_T)):
        student_tv, teacher_tv, passes, event, _ = buffers.fill(pair, rows, 0)
        passes.prepare()
        known = (buffers.rounded(rows), passes, statistics.rows(rows), event)
        yield Chunk(rows, student_tv, teacher_tv, *known)


def _steps(
    pair: Pair, rows: slice, buffers: "_Buffers", number: int, use: Callable[[Chunk], None]
) -> Iterator[None]:
    ids_t = pair.ids_T[rows]
    student_tv, teacher_tv, passes, event, own = buffers.fill(pair, rows, number, ids_t)
    waiting: Waiting
    if teacher_tv is not None:
        given = student_tv, teacher_tv, passes, ids_t, pair.k, pair.shard
        waiting = compare(*given, own, pair.target, by_student=pair.by_student)
    else:
        assert isinstance(pair.teacher, TopKSignal)
        waiting = look_up(student_tv, passes, ids_t, pair.teacher, rows, pair.k, pair.shard)
    statistics = yield from waiting
    if event is not None and pair.sampled_T is not None:
        share_T = event.log_share_of(pair.sampled_T[rows])
        statistics = replace(statistics, sampled_share_T=share_T)
    rounded_tv = buffers.rounded(rows)
    use(Chunk(rows, student_tv, teacher_tv, rounded_tv, passes, statistics, event))


class _Buffers:
    """Logits of one chunk, or of two where one is computed while the other waits."""

    def __init__(self, pair: Pair, *, count: int) -> None:
        columns, num = pair.shard.real, len(pair.ids_T)
        self._scratch = _scratch(pair)
        self._rows = min(max(num, 1), rows_of_chunk(pair, count=count))
        if self._rows >= num:
            count = 1
        models, stride = pair.models, _row_stride(columns, pair.device)
        shape = (count, models, self._rows, stride)
        self._logits = torch.empty(shape, dtype=torch.float32, device=pair.device)[..., :columns]
        dtype, self._rounded = gradient_dtype(pair), None
        if dtype is not None:
            rounded = torch.empty(self._rows, stride, dtype=dtype, device=pair.device)
            self._rounded = rounded[:, :columns]

    def rounded(self, rows: slice) -> Tensor | None:
        """Where the gradient at some rows goes, if not into the place of the logits."""
        return None if self._rounded is None else self._rounded[: rows.stop - rows.start]

    def chunks(self, num: int) -> Iterator[slice]:
        """Rows of each chunk; one empty chunk where there are none, so that shapes come out."""
        for begin in range(0, max(num, 1), self._rows):
            yield slice(begin, min(begin + self._rows, num))

    def fill(
        self, pair: Pair, rows: slice, number: int, ids_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Passes, Event | None, list[Tensor]]:
        """Logits of student and target at some rows, the passes over them, and merged ids.

        With ``ids_t`` also what ``statistics.compare`` calls ``own``.

        Collectives: those of ``merged.merge``, if ids are merged.
        """
        buffer = self._logits[number % len(self._logits), :, : rows.stop - rows.start]
        student_tv, teacher_tv, reference_tv = buffer[0], None, None
        own: list[Tensor] = []
        event = None
        pair.student.write_logits(rows, student_tv)
        if pair.reference is not None and (ids_t is not None or not pair.target.is_teacher):
            reference_tv = buffer[2]
            pair.reference.write_logits(rows, reference_tv)
        if isinstance(pair.teacher, FullSignal):
            teacher_tv = buffer[1]
            pair.teacher.write_logits(rows, teacher_tv)
            models = [student_tv, teacher_tv]
            if reference_tv is not None:
                models.append(reference_tv)
            if pair.merge_ids:
                event = merge(models, pair.merge_ids, pair.shard)
            if ids_t is not None:
                asked = models[2:] + [teacher_tv] * (not pair.target.is_teacher)
                own = [own_part(tv, ids_t, pair.shard, self._scratch) for tv in asked]
            if not pair.target.is_teacher:
                pair.target.write(student_tv, teacher_tv, reference_tv)
                if event is not None:
                    pair.target.write(event.student_t1, event.teacher_t1, event.reference_t1)
        passes = passes_for(student_tv, teacher_tv, pair.spec, self._scratch)
        return student_tv, teacher_tv, passes, event, own


def rows_of_chunk(pair: Pair, *, count: int) -> int:
    """How many rows the budget holds: the shape of a chunk's collectives.

    It is counted for the rank with most columns, by all of them. Ranks that counted for the columns
    they hold would call collectives of other shapes, and another number of them.

    Args:
        pair: the models and tokens.
        count: chunks that share the budget.

    Returns:
        Rows, the same on every rank of the group.
    """
    budget = _budget(pair)
    if needs_scratch(pair.device):
        budget -= _scratch(pair).bytes
    models, stride = pair.models, _row_stride(pair.shard.widest, pair.device)
    of_row, dtype = 4 * count * models * stride, gradient_dtype(pair)
    if dtype is not None:
        of_row += dtype.itemsize * stride
    return _chunk_rows(budget, of_row)


def gradient_dtype(pair: Pair) -> torch.dtype | None:
    """The precision in which the gradient of the logits is written; None: float32, in their place.

    The kernels write it as the two products after them take it. float16 is too narrow for that:
    ``products`` brings rows to one size first.
    """
    student = pair.student
    if needs_scratch(pair.device) or not isinstance(student, HiddenStatesSignal):
        return None
    return torch.bfloat16 if student.hidden_TH.dtype == torch.bfloat16 else None


def _scratch(pair: Pair) -> Scratch:
    shard = pair.shard
    return Scratch(shard.real, pair.device, budget=_budget(pair), widest=shard.widest)


def _row_stride(columns: int, device: torch.device) -> int:
    """Elements from one row to the next.

    On a CPU an odd number of cache lines: where rows lie a power of two apart, blocks of them fall
    into the same few places of the cache, and the products take a twentieth longer. On a GPU rows
    begin at multiples of 128 bytes, whatever the vocabulary.
    """
    if device.type != "cpu":
        return -(-columns // _ALIGNED) * _ALIGNED
    return (-(-columns // _CACHE_LINE) | 1) * _CACHE_LINE


def _budget(pair: Pair) -> int:
    """Bytes of the buffers."""
    if pair.memory_mib is None:
        return _MEMORY_MIB.get(pair.device.type, _MEMORY_MIB_ELSEWHERE) * 2**20
    if pair.memory_mib < 1:
        raise ValueError(
            f"Expected memory_mib of at least 1, found {pair.memory_mib}. None chooses it."
        )
    return pair.memory_mib * 2**20


def _chunk_rows(budget: int, bytes_of_row: int) -> int:
    """Rows of a chunk, from sizes alone: the same run gives the same chunks and the same bits."""
    rows = budget // max(bytes_of_row, 1)
    return max(1, rows // 16 * 16 if rows > 16 else rows)
