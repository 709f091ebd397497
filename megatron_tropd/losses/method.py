"""What a method is: its settings, what it needs, and its loss of a token.

Importing this needs the standard library alone; what computes is imported when it computes.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megatron_tropd.config.loss import LossSettings, Needs
from megatron_tropd.config.settings import Range

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from megatron_tropd.losses import terms as terms
    from megatron_tropd.losses.statistics import TokenStatistics
    from megatron_tropd.losses.targets import LossTargets
    from megatron_tropd.losses.terms import Term
else:

    class _Terms:
        """``losses.terms``, imported with torch when something of it is asked for."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("megatron_tropd.losses.terms"), name)

    terms = _Terms()

TopK = Annotated[int, Range(0, hint="0: everything.")]
Outlier = Literal["forward_kl", "mask", "clip"]
Importance = Literal["none", "truncated", "band", "ppo"]
_ORDER = "loss.importance_low <= 1 <= loss.importance_high must hold."
LowRho = Annotated[float, Range(0, 1, hint=_ORDER)]
HighRho = Annotated[float, Range(1, hint=_ORDER)]


@dataclass(frozen=True)
class BatchFacts:
    """What is known of this rank's loss tokens before a step, in the order of its batches."""

    entropy_T: Tensor
    """[T] nats, the student's."""
    log_ratio_T: Tensor
    """[T] log p(x) - log q(x)."""
    student_logprob_T: Tensor
    """[T] log q(x)."""
    student_T: Tensor
    """[T] bool, written by the student."""
    keys_T: Tensor
    """[T] int64 a number for each token that no layout changes."""
    own_rows_T: Tensor
    """[T] int64 index of the token's sequence among those of this rank."""
    positions_T: Tensor
    """[T] int64 index within prefix + response."""
    shape: tuple[int, int]
    """Sequences of this rank, and positions of the longest."""
    prompts_T: Tensor
    """[T] int64 which prompt of the step, below ``num_prompts``."""
    num_prompts: int
    """Prompts of the step."""
    num_student: int
    """Student tokens of all ranks."""
    longest: int
    """No rank has more tokens."""
    group: dist.ProcessGroup | None
    """The ranks that hold the other tokens."""
    row_group: dist.ProcessGroup | None = None
    """Those among them that hold the others of this rank's sequences; None: they are whole."""


@dataclass(frozen=True)
class TokenChoices:
    """What a method decides of each token from the whole batch."""

    selected_T: Tensor | None = None
    """[T] bool: the tokens that are trained, teacher tokens included. None: all."""
    rewards_T: Tensor | None = None
    """[T] float32 for ``LossTargets.rewards_T``. None: the loss makes its own."""


@dataclass(frozen=True, kw_only=True)
class Method(LossSettings, ABC):
    """A loss. Its fields are its settings; ``needs`` and ``term`` are what a method writes."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the loss must be given."""

    @abstractmethod
    def term(self, statistics: TokenStatistics, targets: LossTargets) -> Term:
        """Value and gradient of every token as one that the student wrote."""

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """The same of tokens that the teacher wrote; None: as the student's."""
        return terms.teacher_token(statistics, beta)

    def choose(self, facts: BatchFacts) -> TokenChoices:
        """Decide what depends on the whole batch; called if ``needs_student_pass``.

        Collectives: those of ``losses.selection`` over ``facts.group``.
        """
        if self.entropy_share is None:
            return TokenChoices()
        return self.select(facts, facts.entropy_T, self.entropy_share)

    @staticmethod
    def select(facts: BatchFacts, values_T: Tensor, share: float) -> TokenChoices:
        """The share of the student's tokens with the largest values of the global batch.

        Args:
            facts: of this rank.
            values_T: [T] what is compared.
            share: of the student's tokens, in (0, 1].
        """
        from megatron_tropd.losses.selection import num_selected, top_share

        chosen_T = top_share(
            values_T,
            num_selected(share, facts.num_student),
            facts.student_T,
            keys_T=facts.keys_T,
            longest=facts.longest,
            group=facts.group,
        )
        return TokenChoices(selected_T=chosen_T | ~facts.student_T)

    def whole_term(self, statistics: TokenStatistics, targets: LossTargets, beta: float) -> Term:
        """The loss of every token, whoever wrote it; ``beta`` is the weight of teacher tokens."""
        student = self.term(statistics, targets)
        teacher = self.teacher_term(statistics, beta)
        if teacher is None:
            return student
        return terms.where(targets.is_teacher_T, teacher, student)


@dataclass(frozen=True, kw_only=True)
class Divergence(Method):
    """A distance of two distributions, at every position; no token is a sample."""

    teacher_tokens: Literal["nll", "same"] = "nll"
    """Loss of tokens the teacher wrote: -beta log q(x), or the divergence."""

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """-beta log q(x), unless ``same`` is asked for."""
        return None if self.teacher_tokens == "same" else super().teacher_term(statistics, beta)


@dataclass(frozen=True, kw_only=True)
class SampledMethod(Method):
    """A policy gradient: reward x log q of the sampled token."""

    gradient: Literal["backprop", "score_function"] = "backprop"
    """score_function feeds forward KL and prefix terms as detached rewards of the sampled token,
    as the authors' code is said to do: for reproducing published numbers, not for training."""
    importance: Importance = "none"
    """How rho = q(x) / (probability that sampled x) enters: not; min(rho, importance_high)
    (truncated); rho within [importance_low, importance_high] and no loss outside (band); PPO's
    clip to the same interval (ppo)."""
    importance_low: LowRho = 0.5
    """Lower end of the interval of rho (band, ppo)."""
    importance_high: HighRho = 2.0
    """Upper end of the interval of rho (truncated, band, ppo)."""

    @property
    def needs(self) -> Needs:
        """Log-probs of a token that the student sampled."""
        return Needs(sampled=True, rollout_logprobs=self.importance != "none")

    def teacher_term(self, statistics: TokenStatistics, beta: float) -> Term | None:
        """-beta log q(x), or its detached reward."""
        by_score = self.gradient == "score_function"
        return terms.teacher_token(statistics, beta, by_score=by_score)

    def policy_gradient(
        self,
        statistics: TokenStatistics,
        targets: LossTargets,
        earned: tuple[Tensor, Tensor],
        *,
        outlier_T: Tensor | None = None,
        divergence: Term | None = None,
    ) -> Term:
        """Train the sampled token by its reward; the arguments are ``terms.policy_gradient``'s."""
        importance = self.importance, self.importance_low, self.importance_high
        more: Any = dict(importance=importance, outlier_T=outlier_T, divergence=divergence)
        return terms.policy_gradient(statistics, targets, earned, **more)


@dataclass(frozen=True, kw_only=True)
class Clipped(SampledMethod):
    """A policy gradient that clips as PPO does, unless told otherwise."""

    importance: Importance = "ppo"
    """How rho enters, as in the other policy gradients."""
    importance_low: LowRho = 0.8
    """Lower end of the interval of rho (band, ppo)."""
    importance_high: HighRho = 1.2
    """Upper end of the interval of rho (truncated, band, ppo)."""
