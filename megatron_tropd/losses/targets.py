"""What the losses take and give, one entry per token."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossTargets:
    """What is known of each token before the student is asked."""

    ids_T: Tensor
    """[T] int64 the token in the trajectory, below the vocabulary size."""
    is_teacher_T: Tensor
    """[T] bool, true where the teacher wrote it (prefix), false where the student sampled it."""
    uniforms_T: Tensor
    """[T] float32 in [0, 1): the keyed draws of the Bernoulli region (``draws.keyed_uniform``)."""
    weights_T: Tensor | None = None
    """[T] float32 factor of each token's loss, 0 to leave it out; None: 1."""
    rollout_logprobs_T: Tensor | None = None
    """[T] float32 log-prob of the token under the policy that sampled it, in nats. Needed by
    ``importance``; read where the student wrote the token."""
    rewards_T: Tensor | None = None
    """[T] float32 reward of each student token in place of the log-ratio's (``selection``)."""
    is_golden_T: Tensor | None = None
    """[T] bool, true where the token is one of a golden answer, which nobody sampled. Given if the
    loss has a term for them (``Needs.golden``)."""


@dataclass(frozen=True)
class LossOutput:
    """A loss per token and what it saw, the same on every rank of the group."""

    loss_T: Tensor
    """[T] float32, differentiable with respect to the student's logits: weight x term."""
    values: dict[str, Tensor]
    """[T] float32 each, detached, nats where they have a unit.

    Always: ``loss`` weight x term, ``term`` the value before the weight, ``student_logprob``
    log q(x), ``teacher_logprob`` log p(x), ``k1`` log q(x) - log p(x), ``trust`` min(p/q, 1) at x,
    ``outlier`` 1 where a student token fell outside the region (its probability where that is
    not drawn; 0 on teacher tokens), ``importance`` rho, ``dropped`` 1 where a token has no
    gradient because rho left its interval or its reward is infinite. With a full signal, and with
    ``metrics`` or where the loss needs them: ``tv``, ``reverse_kl``, ``forward_kl``,
    ``student_entropy``, ``teacher_entropy`` over the whole vocabulary. With a top-k:
    ``topk_mass_teacher``, ``topk_mass_student``.
    """


def unrounded_gradient(weight: Tensor) -> Tensor | None:
    """Megatron's float32 gradient buffer of a parameter in lower precision, else None.

    What :func:`tropd_loss_from_hidden` takes as ``main_grad``.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    return None if main_grad is None or main_grad.dtype == weight.dtype else main_grad


@dataclass(frozen=True)
class SummedLoss:
    """A summed loss and what it saw, the same on every rank of the group."""

    loss: Tensor
    """[] float32 sum of weight x term, differentiable with respect to hidden states and weight."""
    values: dict[str, Tensor]
    """As in :class:`LossOutput`."""
