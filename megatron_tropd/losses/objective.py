r"""Trust Region On-Policy Distillation and plain on-policy distillation, one float per token.

Nothing here reduces over tokens, knows about micro-batches or imports Megatron: the caller sums
and divides by the number of loss tokens of the whole step.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k.
p = teacher, q = student, x = the token in the trajectory.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import LossConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.signals import FullSignal, TeacherSignal, TopKSignal, check_signal
from megatron_tropd.losses.statistics import TokenStatistics, chunk_rows, token_statistics


@dataclass(frozen=True)
class LossTargets:
    """What is known of each token before the student is asked."""

    ids_T: Tensor
    """[T] int64 the token in the trajectory, below the vocabulary size."""
    is_teacher_T: Tensor
    """[T] bool, true where the teacher wrote it (prefix), false where the student sampled it."""
    uniforms_T: Tensor
    """[T] float32 in [0, 1): the keyed draws of the Bernoulli region (``draws.keyed_uniform``)."""


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it saw, the same on every rank of the group."""

    loss_T: Tensor
    """[T] float32, differentiable with respect to the student's logits: segment weight x term."""
    values: dict[str, Tensor]
    """[T] float32 each, detached, nats where they have a unit.

    Always: ``student_logprob`` log q(x), ``teacher_logprob`` log p(x), ``trust`` min(p/q, 1) at x,
    ``outlier`` 1 where a student token fell outside the region (0 on teacher tokens), ``term``
    the value of the loss term before the segment weight, ``k1`` log q(x) - log p(x).
    With a full signal: ``tv``, ``reverse_kl``, ``forward_kl``, ``student_entropy``,
    ``teacher_entropy`` over the whole vocabulary. With a top-k: ``topk_mass_teacher``,
    ``topk_mass_student``.
    """


@dataclass(frozen=True)
class _Terms:
    """Loss = value, with the gradient of ``a log q(x) - f sum_K p log q`` (a, f constant)."""

    value_T: Tensor
    outlier_T: Tensor
    sampled_weight_T: Tensor
    """a: what multiplies log q(x)."""
    forward_kl_weight_T: Tensor
    """f: what multiplies the top-k forward KL."""


def tropd_loss(
    student_logits_Tv: Tensor,
    targets: LossTargets,
    signal: TeacherSignal,
    *,
    config: LossConfig,
    beta: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    segment_weights: tuple[float, float] = (1.0, 1.0),
    chunk: int | None = None,
) -> LossOutput:
    r"""TrOPD loss of every token, unreduced; ``region = "none"`` is plain on-policy distillation.

    A student token is trusted, M = 1, with probability min(p(x)/q(x), 1) (``bernoulli``), when
    log p(x)/q(x) > tau (``threshold``), or always (``none``). With sg the stop-gradient:

    .. math::
        \ell = \begin{cases}
          -\mathrm{sg}(\log p(x) - \log q(x)) \, \log q(x) & M = 1 \\
          \sum_{v \in \mathrm{TopK}(p)} p(v) (\log p(v) - \log q(v)) & M = 0, \text{forward\_kl} \\
          0 & M = 0, \text{mask} \\
          -\mathrm{sg}(\max(\log p(x) - \log q(x), \tau)) \, \log q(x) & M = 0, \text{clip} \\
          -\beta \log q(x) & \text{teacher tokens}
        \end{cases}

    The gradient is that of the formula. The *value* of the terms with a stop-gradient is
    reported without the factor log q(x): -(log p(x) - log q(x)) where M = 1 and
    -max(log p(x) - log q(x), tau) where clipped, so that the mean estimates a divergence.

    Args:
        student_logits_Tv: [T, v] any float dtype, this rank's shard. Not modified. Gradient
            flows here only, in the same dtype; padded columns get 0.
        targets: the tokens, the same on every rank of ``group``.
        signal: the teacher at the same T positions, sharded like the student where it is sharded.
        config: which loss.
        beta: weight of teacher tokens.
        vocab_size: real columns of the whole vocabulary; further ones are padding.
        group: the ranks the vocabulary is sharded over; None where it is not.
        segment_weights: factors of the loss on (teacher, student) tokens.
        chunk: rows handled at a time; None: as many as keep temporaries within about 64 MiB.

    Returns:
        The loss and detached values, identical on every rank of ``group``.

    Raises:
        ConfigError: the signal does not provide what the loss needs, or top-k exceeds the
            vocabulary.
        ValueError: shapes, vocabulary sizes or token ids do not fit together.

    Collectives: forward, per chunk of t rows, 1 all-gather of at most [t, K + 2] int64 and 1
    all-reduce (SUM) of at most [t, K + 7] float32; backward none.

    Source: Trust Region On-Policy Distillation, arXiv 2606.01249.
    """
    check_signal(config, signal, vocab_size=vocab_size)
    _check_inputs(student_logits_Tv, targets, signal, config, vocab_size)
    k = min(config.top_k, vocab_size)
    with torch.no_grad():
        statistics = token_statistics(
            student_logits_Tv,
            targets.ids_T,
            signal,
            k=k,
            vocab_size=vocab_size,
            group=group,
            chunk=chunk,
        )
        terms = _terms(statistics, targets, config, beta)
        weight_T = torch.where(targets.is_teacher_T, *segment_weights)
    start, real = vp.local_columns(student_logits_Tv.shape[-1], vocab_size=vocab_size, group=group)
    loss_T = _LossOfLogits.apply(
        student_logits_Tv,
        weight_T * terms.value_T,
        weight_T * terms.sampled_weight_T,
        weight_T * terms.forward_kl_weight_T,
        targets.ids_T,
        statistics.topk_ids_TK,
        statistics.topk_teacher_logprobs_TK.exp(),
        statistics.student_normaliser_T2,
        (start, real),
        chunk_rows(student_logits_Tv.shape[-1], chunk),
    )
    return LossOutput(loss_T, _values(statistics, terms))


def _terms(
    statistics: TokenStatistics, targets: LossTargets, config: LossConfig, beta: float
) -> _Terms:
    """Value of each token's term and what multiplies its log-probs in the gradient."""
    is_teacher_T = targets.is_teacher_T
    log_ratio_T = statistics.teacher_logprob_T - statistics.student_logprob_T
    outlier_T = ~is_teacher_T & ~_trusted(log_ratio_T, targets.uniforms_T, config)

    reward_T, forward_kl_T = log_ratio_T, torch.zeros_like(log_ratio_T)
    forward_kl_weight_T = torch.zeros_like(log_ratio_T)
    if config.outlier == "clip" and config.tau is not None:
        reward_T = torch.where(outlier_T, log_ratio_T.clamp(min=config.tau), reward_T)
    else:
        reward_T = torch.where(outlier_T, 0.0, reward_T)
    if config.outlier == "forward_kl" and config.region != "none":
        forward_kl_T = torch.where(outlier_T, _top_k_forward_kl(statistics), 0.0)
        forward_kl_weight_T = outlier_T.float()

    teacher_value_T = -beta * statistics.student_logprob_T
    return _Terms(
        value_T=torch.where(is_teacher_T, teacher_value_T, forward_kl_T - reward_T),
        outlier_T=outlier_T,
        sampled_weight_T=torch.where(is_teacher_T, -beta, -reward_T),
        forward_kl_weight_T=forward_kl_weight_T,
    )


def _trusted(log_ratio_T: Tensor, uniforms_T: Tensor, config: LossConfig) -> Tensor:
    """[T] bool: the token lies inside the trust region."""
    if config.region == "none":
        return torch.ones_like(log_ratio_T, dtype=torch.bool)
    if config.region == "threshold":
        assert config.tau is not None
        return log_ratio_T > config.tau
    return uniforms_T < _trust(log_ratio_T)


def _trust(log_ratio_T: Tensor) -> Tensor:
    """[T] min(p/q, 1): the acceptance probability of speculative decoding."""
    return log_ratio_T.clamp(max=0.0).exp()


def _top_k_forward_kl(statistics: TokenStatistics) -> Tensor:
    """[T] sum over the teacher's top-k of p (log p - log q); probabilities not renormalised."""
    log_p_TK = statistics.topk_teacher_logprobs_TK
    p_TK = log_p_TK.exp()
    terms_TK = p_TK * (log_p_TK - statistics.topk_student_logprobs_TK)
    return torch.where(p_TK > 0, terms_TK, 0.0).sum(dim=-1)


def _values(statistics: TokenStatistics, terms: _Terms) -> dict[str, Tensor]:
    """``LossOutput.values``."""
    log_ratio_T = statistics.teacher_logprob_T - statistics.student_logprob_T
    values = {
        "student_logprob": statistics.student_logprob_T,
        "teacher_logprob": statistics.teacher_logprob_T,
        "trust": _trust(log_ratio_T),
        "outlier": terms.outlier_T.float(),
        "term": terms.value_T,
        "k1": -log_ratio_T,
        **statistics.divergences(),
    }
    if statistics.topk_ids_TK.shape[-1] > 0:
        values["topk_mass_teacher"] = statistics.topk_teacher_logprobs_TK.exp().sum(dim=-1)
        values["topk_mass_student"] = statistics.topk_student_logprobs_TK.exp().sum(dim=-1)
    return values


class _LossOfLogits(torch.autograd.Function):
    """Given values forward, the closed-form gradient of ``a log q(x) - f sum_K p log q`` back.

    d log q(x) / d z_j = 1[j = x] - q_j, hence
    d / d z_j = a 1[j = x] - f p_j 1[j in K] - (a - f sum_K p) q_j.
    """

    @staticmethod
    def forward(
        ctx,
        student_logits_Tv: Tensor,
        value_T: Tensor,
        sampled_weight_T: Tensor,
        forward_kl_weight_T: Tensor,
        ids_T: Tensor,
        topk_ids_TK: Tensor,
        topk_p_TK: Tensor,
        student_normaliser_T2: Tensor,
        columns: tuple[int, int],
        chunk: int,
    ) -> Tensor:
        ctx.columns, ctx.chunk = columns, chunk
        pushed_ids_TK = torch.cat([ids_T.unsqueeze(-1), topk_ids_TK], dim=-1)
        pushes_TK = torch.cat(
            [sampled_weight_T.unsqueeze(-1), -forward_kl_weight_T.unsqueeze(-1) * topk_p_TK], dim=-1
        )
        ctx.save_for_backward(student_logits_Tv, student_normaliser_T2, pushed_ids_TK, pushes_TK)
        return value_T

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad_T,) = grads
        logits_Tv, normaliser_T2, ids_TK, pushes_TK = ctx.saved_tensors
        start, real = ctx.columns
        grad_Tv = torch.zeros_like(logits_Tv)
        for begin in range(0, logits_Tv.shape[0] if real else 0, ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            scaled_TK = pushes_TK[rows] * grad_T[rows].unsqueeze(-1)
            log_q_Tv = vp.normalise(logits_Tv[rows, :real].float(), normaliser_T2[rows])
            part_Tv = log_q_Tv.exp_().mul_(-scaled_TK.sum(dim=-1, keepdim=True))
            local_TK, mine_TK = vp.local_ids(ids_TK[rows], start=start, columns=real)
            part_Tv.scatter_add_(-1, local_TK, torch.where(mine_TK, scaled_TK, 0.0))
            grad_Tv[rows, :real] = part_Tv
        return grad_Tv, *[None] * 9


def _check_inputs(
    student_logits_Tv: Tensor,
    targets: LossTargets,
    signal: TeacherSignal,
    config: LossConfig,
    vocab_size: int,
) -> None:
    num = student_logits_Tv.shape[0]
    found = {
        "targets.ids_T": targets.ids_T.shape[0],
        "targets.is_teacher_T": targets.is_teacher_T.shape[0],
        "targets.uniforms_T": targets.uniforms_T.shape[0],
        "the teacher signal": signal.num_tokens,
    }
    if wrong := {name: count for name, count in found.items() if count != num}:
        raise ValueError(
            f"Expected {num} tokens everywhere, as in the student's logits, found {wrong}. "
            "Cut all of them from the same micro-batch."
        )
    if isinstance(signal, FullSignal) and signal.vocab_size != vocab_size:
        raise ConfigError(
            f"Expected a teacher with the student's vocabulary of {vocab_size} tokens, found "
            f"{signal.vocab_size}. Give both the size of the tokenizer they share."
        )
    needs_topk = config.region != "none" and config.outlier == "forward_kl"
    if isinstance(signal, TopKSignal) and needs_topk:
        width = signal.topk_ids_TK.shape[-1]
        if width < config.top_k:
            raise ConfigError(
                f"loss.top_k = {config.top_k} needs as many teacher ids per token, found {width}. "
                f"Ask the teacher for {config.top_k} or set loss.top_k to {width}."
            )
    if num and not 0 <= int(targets.ids_T.min()) <= int(targets.ids_T.max()) < vocab_size:
        raise ValueError(
            f"Expected token ids in 0..{vocab_size - 1}, found "
            f"{int(targets.ids_T.min())}..{int(targets.ids_T.max())}. Check the tokenizer of the "
            "trajectories against the model."
        )
