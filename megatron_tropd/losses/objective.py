r"""The distillation losses, from logits or from hidden states.

Nothing here knows about micro-batches or imports Megatron: the caller divides by the number of
loss tokens of the whole step.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, H = hidden, K = top-k,
R = ranks of the group. p = teacher, q = student, x = the token in the trajectory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import products
from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.align import align_logits
from megatron_tropd.losses.checks import (
    check_inputs,
    check_products,
    other_bounds,
    shard_of_signal,
    width_of_top_k,
)
from megatron_tropd.losses.chunks import Chunk, Pair, for_each_chunk, gradient_chunks
from megatron_tropd.losses.first_order import first_order
from megatron_tropd.losses.merged import with_one_id
from megatron_tropd.losses.method import Method
from megatron_tropd.losses.sharded_rows import gather_rows, sum_gradient
from megatron_tropd.losses.signals import (
    FullSignal,
    HiddenStatesSignal,
    LogitsSignal,
    ReferencedSignal,
    TeacherSignal,
    check_signal,
    split_reference,
    tensors_of,
)
from megatron_tropd.losses.statistics import Target, TokenStatistics
from megatron_tropd.losses.targets import LossOutput, LossTargets, SummedLoss
from megatron_tropd.losses.tensors import check_numbers, check_tensors, rows_of
from megatron_tropd.losses.terms import Term, dense_spec, trust

_METRICS_TOP_K = 64


def tropd_loss(
    student_logits_Tv: Tensor,
    targets: LossTargets,
    signal: TeacherSignal,
    *,
    config: Method,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    beta: float = 0.001,
    bounds: Sequence[int] | None = None,
    metrics: bool = True,
    memory_mib: int | None = None,
) -> LossOutput:
    """Loss of every token from logits, unreduced; ``config`` says which (docs/losses.md).

    With the defaults a student token is trusted, M = 1, with probability m = min(p(x)/q(x), 1):

        trusted token    -sg(log p(x) - log q(x)) log q(x)
        outlier          sum over v in top-k of p: p(v) (log p(v) - log q(v))
        teacher's token  -beta log q(x)

    The gradient is that of the formula. Terms with a stop-gradient report their *value* without
    the factor log q(x), so that the mean estimates a divergence.

    Args:
        student_logits_Tv: [T, v] any float dtype, this rank's shard. Not modified. Gradient
            flows here only, in the same dtype; padded columns get 0.
        targets: the tokens, the same on every rank of ``group``.
        signal: the teacher at the same T positions. Logits sharded at other bounds are re-sharded
            here (a copy of their size); see ``align``.
        config: which loss.
        vocab_size: real columns of the whole vocabulary; further ones are padding.
        group: the ranks the vocabulary is sharded over; None where it is not.
        beta: weight of teacher tokens.
        bounds: R + 1 column ids where the ranks' shards start and end; None: equal widths.
        metrics: also report the divergences, entropies and top-k masses the loss does not need.
        memory_mib: budget of the chunk buffers; None: 72 MiB on CPU, 4 GiB on GPUs.

    Returns:
        The loss and detached values, identical on every rank of ``group``.

    Raises:
        ConfigError: the signal does not provide what the loss needs, or top-k exceeds the
            vocabulary.
        ValueError: shapes, dtypes, vocabulary sizes or token ids do not fit together.

    Collectives: forward, per chunk of t rows, 1 all-gather of at most [t, 3 K + 10] 32-bit words
    and, for sums over the vocabulary, 1 all-reduce (SUM) of at most [t, 7] float32; 1
    all-to-all where the bounds differ; backward none.

    Source: Trust Region On-Policy Distillation, arXiv 2606.01249.
    """
    check_numbers(beta=beta, vocab_size=vocab_size)
    check_tensors(student=LogitsSignal(student_logits_Tv, vocab_size))
    student = LogitsSignal(student_logits_Tv.detach(), vocab_size, _tuple(bounds))
    shard = shard_of_signal(student, group, "student")
    signal = _aligned(signal, shard)
    pair, targets = _pair(student, targets, signal, config, shard, metrics, memory_mib)
    with torch.no_grad():
        statistics = _collect(pair)
        term = config.whole_term(statistics, targets, beta)
        weighted = _weighted(term, targets)
    loss_of_logits: Callable[..., Tensor] = _LossOfLogits.apply
    loss_T = loss_of_logits(student_logits_Tv, weighted, statistics, pair)
    return LossOutput(loss_T, _values(statistics, term, weighted))


def tropd_loss_from_hidden(
    hidden_TH: Tensor,
    output_weight_vH: Tensor,
    targets: LossTargets,
    signal: TeacherSignal,
    *,
    config: Method,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    beta: float = 0.001,
    bounds: Sequence[int] | None = None,
    metrics: bool = True,
    memory_mib: int | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    main_grad: Tensor | None = None,
) -> SummedLoss:
    """Summed loss from the student's last hidden states and output layer, no [T, v] buffer.

    The loss of :func:`tropd_loss` with logits = hidden @ weight^T, a chunk of tokens at a time. The
    gradients are made in the forward pass, while a chunk's logits are there, which is why the
    weights of the tokens have to be in ``targets`` (``weights_T``), not in what is done with the
    result. Working memory: the chunk buffers, the two gradients, and per-token values.

    The arguments that are not named here are as there, ``vocab_size`` and ``bounds`` of the output
    layer's rows; a signal over the vocabulary is sharded at the same bounds.

    Args:
        hidden_TH: [T, H] after the final norm, any float dtype, the same on every rank of
            ``group``; with ``sequence_parallel`` this rank's [T / R, H] rows. Not modified.
        output_weight_vH: [v, H] this rank's rows of the output layer, the same dtype (the
            embedding's, where tied). Not modified.
        targets: all T tokens, the same on every rank of ``group``.
        sequence_parallel: gather the rows first; scatter the summed gradient.
        reduce_hidden_grad: sum the gradient of the hidden states over the ranks. False where the
            caller does (Megatron's ``copy_to_tensor_model_parallel_region``).
        main_grad: [v, H] float32; backward adds the weight's gradient here, unrounded, instead of
            returning it to autograd (``unrounded_gradient(weight)`` finds Megatron's).

    Returns:
        The summed loss and detached values, identical on every rank of ``group``. Backward works
        once: the gradients are handed out, not kept.

    Raises:
        ConfigError, ValueError: as there, of bounds as well.

    Collectives: forward per chunk as there; with ``sequence_parallel`` 1 all-gather of the rows.
    Backward: 1 all-reduce (SUM) of [T, H], a reduce-scatter with ``sequence_parallel``, none
    without ``reduce_hidden_grad``.
    """
    check_numbers(beta=beta, vocab_size=vocab_size)
    check_tensors(student=HiddenStatesSignal(hidden_TH, output_weight_vH, vocab_size))
    if sequence_parallel:
        hidden_TH = gather_rows(hidden_TH, group)
    elif reduce_hidden_grad:
        hidden_TH = sum_gradient(hidden_TH, group)
    student = HiddenStatesSignal(
        hidden_TH.detach(), output_weight_vH.detach(), vocab_size, _tuple(bounds)
    )
    shard = shard_of_signal(student, group, "student")
    check_products(student, signal, shard, main_grad)
    pair, targets = _pair(student, targets, signal, config, shard, metrics, memory_mib)
    maker = _GradientMaker(pair, targets, config, beta, main_grad)
    loss_of_hidden: Callable[..., Tensor] = _LossOfHidden.apply
    loss = loss_of_hidden(hidden_TH, output_weight_vH, maker)
    return SummedLoss(loss, maker.values())


def token_statistics(
    student: FullSignal,
    targets: LossTargets,
    signal: TeacherSignal,
    *,
    config: Method,
    group: dist.ProcessGroup | None,
    memory_mib: int | None = None,
) -> TokenStatistics:
    """What the losses would see of the student's logits or hidden states, without a gradient.

    The other arguments, errors and collectives are those of :func:`tropd_loss`, or of
    :func:`tropd_loss_from_hidden`.
    """
    shard = shard_of_signal(student, group, "student")
    if isinstance(student, HiddenStatesSignal):
        check_products(student, signal, shard)
    else:
        signal = _aligned(signal, shard)
    pair, _ = _pair(student, targets, signal, config, shard, True, memory_mib)
    return _collect(pair)


@torch.no_grad()
def _collect(pair: Pair) -> TokenStatistics:
    parts: list[TokenStatistics] = []
    for_each_chunk(pair, lambda chunk: parts.append(chunk.statistics))
    return TokenStatistics.concatenate(parts)


class _LossOfLogits(torch.autograd.Function):
    """Given values forward, the closed-form gradient back, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_Tv: Tensor, term: Term, statistics: TokenStatistics, pair: Pair
    ) -> Tensor:
        # For the version check: the gradient reads all of these again.
        teacher = tensors_of(pair.teacher) if pair.full else []
        if pair.reference is not None:
            teacher += tensors_of(pair.reference)
        ctx.save_for_backward(student_logits_Tv, pair.ids_T, *teacher)
        ctx.term, ctx.statistics, ctx.pair = term, statistics, pair
        return term.value_T.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_T,) = grads
        logits_Tv, *_ = ctx.saved_tensors
        pair: Pair = ctx.pair
        term = ctx.term.scaled(grad_T)
        grad_Tv = torch.zeros_like(logits_Tv)
        for chunk in gradient_chunks(pair, ctx.statistics):
            rows = chunk.rows
            grad_tv = chunk.gradient(pair.ids_T[rows], rows_of(term, rows), pair.spec, pair.shard)
            grad_Tv[rows, : pair.shard.real] = grad_tv
        return grad_Tv, None, None, None


class _GradientMaker:
    """Loss and gradients of hidden states and weight, chunk by chunk."""

    def __init__(
        self,
        pair: Pair,
        targets: LossTargets,
        config: Method,
        beta: float,
        main_grad: Tensor | None,
    ) -> None:
        self.main_grad = main_grad
        self._wanted = torch.is_grad_enabled()
        self.hidden_grad_TH: Tensor | None = None
        self.weight_grad_vH: Tensor | None = None
        self._pair, self._targets, self._config, self._beta = pair, targets, config, beta
        self._values: list[dict[str, Tensor]] = []

    def run(self, *, hidden: bool, weight: bool) -> Tensor:
        """Sum of the loss; makes the gradients asked for."""
        student = self._pair.student
        assert isinstance(student, HiddenStatesSignal)
        if hidden and self._wanted:
            # Rounded once, after the factor that backward brings: fp16 would lose what a loss
            # scale is there to save.
            dtype = torch.promote_types(student.hidden_TH.dtype, torch.float32)
            self.hidden_grad_TH = torch.empty_like(student.hidden_TH, dtype=dtype)
        if weight and self._wanted:
            self.weight_grad_vH = torch.empty_like(student.output_weight_vH, dtype=torch.float32)
            self.weight_grad_vH[self._pair.shard.real :].zero_()
        for_each_chunk(self._pair, self._use)
        return self.values()["loss"].sum()

    def values(self) -> dict[str, Tensor]:
        """``SummedLoss.values``."""
        names = self._values[0]
        return {name: torch.cat([values[name] for values in self._values]) for name in names}

    def _use(self, chunk: Chunk) -> None:
        pair, rows = self._pair, chunk.rows
        targets = rows_of(self._targets, rows)
        term = self._config.whole_term(chunk.statistics, targets, self._beta)
        weighted = _weighted(term, targets)
        self._values.append(_values(chunk.statistics, term, weighted))
        if self.hidden_grad_TH is None and self.weight_grad_vH is None:
            return
        student = pair.student
        assert isinstance(student, HiddenStatesSignal)
        grad_tv = chunk.gradient(targets.ids_T, weighted, pair.spec, pair.shard)
        weight_vH = student.output_weight_vH[: pair.shard.real]
        if self.hidden_grad_TH is not None:
            products.write_hidden_grad(grad_tv, weight_vH, self.hidden_grad_TH[rows])
        if self.weight_grad_vH is not None:
            total_vH = self.weight_grad_vH[: pair.shard.real]
            hidden_tH = _silenced(student.hidden_TH[rows], targets.weights_T)
            products.add_weight_grad(grad_tv, hidden_tH, total_vH, first=rows.start == 0)


class _LossOfHidden(torch.autograd.Function):
    """Everything forward; backward hands out the gradients that are there."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, maker: _GradientMaker) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        loss = maker.run(hidden=needs_hidden, weight=needs_weight)
        ctx.maker, ctx.dtype = maker, weight_vH.dtype
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        maker: _GradientMaker = ctx.maker
        hidden_TH, maker.hidden_grad_TH = maker.hidden_grad_TH, None
        weight_vH, maker.weight_grad_vH = maker.weight_grad_vH, None
        if hidden_TH is None and weight_vH is None:
            raise RuntimeError(
                "Expected one backward pass through tropd_loss_from_hidden, found a second. Call "
                "the loss again: its gradients are handed out, not kept."
            )
        if hidden_TH is not None:
            hidden_TH = hidden_TH.mul_(grad).to(ctx.dtype)
        if weight_vH is not None:
            weight_vH = weight_vH.mul_(grad)
            if maker.main_grad is not None:
                maker.main_grad.add_(weight_vH)
                weight_vH = None
            else:
                weight_vH = weight_vH.to(ctx.dtype)
        return hidden_TH, weight_vH, None


def _pair(
    student: FullSignal,
    targets: LossTargets,
    signal: TeacherSignal,
    config: Method,
    shard: vp.Shard,
    metrics: bool,
    memory_mib: int | None,
) -> tuple[Pair, LossTargets]:
    """What the passes need, and the targets as they may be used."""
    check_signal(config, signal, vocab_size=student.vocab_size)
    signal, reference = split_reference(signal)
    targets, signal = check_inputs(student, targets, signal, config)
    if not config.needs.reference:
        reference = None
    if reference is not None:
        check_inputs(student, targets, reference, config, who="reference")
    full = isinstance(signal, FullSignal)
    k = config.needs.top_k
    if metrics and not k:
        wanted = min(_METRICS_TOP_K, student.vocab_size)
        k = wanted if full else min(wanted, width_of_top_k(signal))
    pair = Pair(
        student=student,
        teacher=signal,
        ids_T=with_one_id(targets.ids_T, config.merge_ids),
        sampled_T=targets.ids_T,
        merge_ids=config.merge_ids,
        k=k,
        spec=dense_spec(config.needs, metrics=metrics, full=full),
        shard=shard,
        device=targets.ids_T.device,
        memory_mib=memory_mib,
        by_student=config.needs.student_top_k,
        reference=reference,
        target=Target(config.needs.target, reference is not None),
    )
    return pair, replace(targets, ids_T=pair.ids_T)


def _silenced(hidden_tH: Tensor, weights_t: Tensor | None) -> Tensor:
    """Hidden states for a product over tokens, 0 at those left out: 0 x nan would be nan."""
    if weights_t is None:
        return hidden_tH
    return torch.where((weights_t == 0).unsqueeze(-1), 0.0, hidden_tH)


def _weighted(term: Term, targets: LossTargets) -> Term:
    return term if targets.weights_T is None else term.scaled(targets.weights_T.float())


def _values(statistics: TokenStatistics, term: Term, weighted: Term) -> dict[str, Tensor]:
    """``LossOutput.values``; copies, since backward reads what they are made of."""
    values = {
        "loss": weighted.value_T,
        "term": term.value_T,
        "student_logprob": statistics.student_logprob_T + statistics.sampled_share_T,
        "teacher_logprob": statistics.teacher_logprob_T,
        "trust": trust(statistics.log_ratio_T),
        "k1": -statistics.log_ratio_T,
        "outlier": term.outlier_T,
        "importance": term.importance_T,
        "dropped": term.dropped_T.float(),
        **statistics.divergences(),
    }
    if statistics.topk_ids_TK.shape[-1] > 0:
        values["topk_mass_teacher"] = statistics.topk_teacher_logprobs_TK.exp().sum(dim=-1)
        values["topk_mass_student"] = statistics.topk_student_logprobs_TK.exp().sum(dim=-1)
    if statistics.reference_logprob_T.dim() == 1:
        values["reference_logprob"] = statistics.reference_logprob_T
    return {name: value_T.clone() for name, value_T in values.items()}


def _tuple(bounds: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if bounds is None else tuple(bounds)


def _aligned(signal: TeacherSignal, shard: vp.Shard) -> TeacherSignal:
    """The teacher's logits on the student's columns, and its reference's."""
    if isinstance(signal, ReferencedSignal):
        both: list[Any] = [_aligned(part, shard) for part in (signal.teacher, signal.reference)]
        return ReferencedSignal(*both)
    if not isinstance(signal, FullSignal):
        return signal
    teacher = shard_of_signal(signal, shard.group, "teacher")
    if teacher.bounds == shard.bounds:
        return signal
    if not isinstance(signal, LogitsSignal):
        raise other_bounds(teacher, shard)
    columns_Tv = signal.logits_Tv[:, : teacher.real]
    aligned_Tv = align_logits(columns_Tv, have=teacher.bounds, want=shard.bounds, group=shard.group)
    return LogitsSignal(aligned_Tv, signal.vocab_size, shard.bounds)
