"""What a loss may know about the teacher, and from where.

A signal says what it provides; a loss says what it needs (:func:`required_signal`). The two are
compared once at start-up (:func:`check_signal`), so a mismatch never costs a step.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k, H = hidden.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import LossConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import vocab_parallel as vp

SAMPLED = "sampled"
"""log p of the token in the trajectory."""
TOP_K = "top_k"
"""The teacher's k most likely ids and their log p."""
FULL = "full"
"""Every log p: the other two and all sums over the vocabulary follow from it."""


class TeacherSignal(Protocol):
    """Knowledge about the teacher at T positions."""

    provides: ClassVar[frozenset[str]]
    """Subset of {"sampled", "top_k", "full"}."""

    @property
    def num_tokens(self) -> int:
        """T."""
        ...


@runtime_checkable
class FullSignal(TeacherSignal, Protocol):
    """A signal that can produce the teacher's logits, some rows at a time."""

    @property
    def vocab_size(self) -> int:
        """Real columns; the same for student and teacher."""
        ...

    def logits(self, rows: slice) -> Tensor:
        """[t, v] float32 this rank's shard of the teacher's logits at those tokens."""
        ...


@dataclass(frozen=True)
class HiddenStatesSignal:
    """A teacher on the same ranks: its last hidden states and its output layer."""

    hidden_TH: Tensor
    """[T, H] after the final norm, whole on every rank of the group."""
    output_weight_vH: Tensor
    """[v, H] this rank's rows of the output layer, padded like the student's."""
    vocab_size: int
    """Real rows of the whole output layer."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_TH.shape[0]

    def logits(self, rows: slice) -> Tensor:
        """Teacher logits of some tokens.

        Args:
            rows: which of the T tokens.

        Returns:
            [t, v] float32, multiplied in the dtype of the teacher.
        """
        return (self.hidden_TH[rows] @ self.output_weight_vH.t()).float()


@dataclass(frozen=True)
class LogitsSignal:
    """A teacher whose logits are already there."""

    logits_Tv: Tensor
    """[T, v] any float dtype, this rank's shard, padded like the student's."""
    vocab_size: int
    """Real columns of the whole vocabulary."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.logits_Tv.shape[0]

    def logits(self, rows: slice) -> Tensor:
        """Teacher logits of some tokens.

        Args:
            rows: which of the T tokens.

        Returns:
            [t, v] float32.
        """
        return self.logits_Tv[rows].float()


@dataclass(frozen=True)
class TopKSignal:
    """A teacher anywhere: other ranks, a server, a file. The same on every rank of the group."""

    sampled_logprobs_T: Tensor
    """[T] float32 log p of the token in the trajectory, over the whole vocabulary, in nats."""
    topk_ids_TK: Tensor
    """[T, K] int64 most likely ids, most likely first."""
    topk_logprobs_TK: Tensor
    """[T, K] float32 their log p over the whole vocabulary (not renormalised), in nats."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.sampled_logprobs_T.shape[0]


def top_k_signal(
    logits_Tv: Tensor, ids_T: Tensor, k: int, *, vocab_size: int, group: dist.ProcessGroup | None
) -> TopKSignal:
    """Reduce teacher logits to what other ranks need to know.

    Args:
        logits_Tv: [T, v] teacher logits, any float dtype, this rank's shard. Not modified.
        ids_T: [T] int64 tokens of the trajectory.
        k: size of the support.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        The signal, the same on every rank of ``group``.

    Raises:
        ValueError: k is larger than the vocabulary.

    Collectives: 2 all-gathers of [T, 2] float32 and [T, k] int64, 1 all-reduce (SUM) of [T]
    float32.
    """
    normaliser_T2 = vp.normaliser(logits_Tv, vocab_size=vocab_size, group=group)
    topk_TK, topk_ids_TK = vp.top_k(logits_Tv, k, vocab_size=vocab_size, group=group)
    sampled_T1 = vp.gather_columns(
        logits_Tv, ids_T.unsqueeze(-1), vocab_size=vocab_size, group=group
    )
    return TopKSignal(
        sampled_logprobs_T=vp.normalise(sampled_T1, normaliser_T2).squeeze(-1),
        topk_ids_TK=topk_ids_TK,
        topk_logprobs_TK=vp.normalise(topk_TK, normaliser_T2),
    )


def required_signal(config: LossConfig) -> frozenset[str]:
    """What a loss must know about the teacher.

    Args:
        config: the loss.

    Returns:
        Subset of {"sampled", "top_k", "full"}.
    """
    uses_topk = config.region != "none" and config.outlier == "forward_kl"
    return frozenset({SAMPLED, TOP_K}) if uses_topk else frozenset({SAMPLED})


def check_signal(
    config: LossConfig, signal: type[TeacherSignal] | TeacherSignal, *, vocab_size: int
) -> None:
    """Refuse a loss that the teacher signal or the vocabulary cannot serve. Call it at start-up.

    Args:
        config: the loss.
        signal: the signal that training will use, or its class.
        vocab_size: real columns of the vocabulary.

    Raises:
        ConfigError: the loss needs something the signal does not provide, or its top-k exceeds
            the vocabulary.
    """
    needed = required_signal(config)
    name = signal.__name__ if isinstance(signal, type) else type(signal).__name__
    loss = f"loss.region = {config.region!r} with loss.outlier = {config.outlier!r}"
    if missing := needed - signal.provides:
        raise ConfigError(
            f"{loss} needs {sorted(missing)} of the teacher, but {name} provides only "
            f"{sorted(signal.provides)}. Choose another loss or another teacher signal."
        )
    if TOP_K in needed and config.top_k > vocab_size:
        raise ConfigError(
            f"{loss} needs loss.top_k <= the vocabulary of {vocab_size} tokens, found "
            f"{config.top_k}. Set loss.top_k to at most {vocab_size}."
        )
