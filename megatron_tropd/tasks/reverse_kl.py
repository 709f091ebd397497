"""Exact KL(student || teacher) on the student's own samples, by transformers in float32.

The yardstick of a distillation without a grader. It shares no code with the losses, so a mistake
there cannot hide here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_tropd.base.errors import InputError

_Z_95 = 1.959963984540054
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class ReverseKLResult:
    """KL(student || teacher) per token of the student's samples."""

    reverse_kl: float
    """Mean over tokens, nats."""
    ci_low: float
    """Lower end of the 95 % interval; sequences, not tokens, are taken as independent."""
    ci_high: float
    sequences: int
    tokens: int


def measure_reverse_kl(
    student_folder: str | Path,
    teacher_folder: str | Path,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab_size: int,
    tokens_per_batch: int = _TOKENS_PER_BATCH,
) -> ReverseKLResult:
    r"""Mean over response tokens of the divergence of the two next-token distributions.

    .. math:: \mathrm{KL}_t = \sum_v q_t(v) \, (\log q_t(v) - \log p_t(v))

    Args:
        sequences: (prompt ids, response ids); only positions that predict a response token count.
        vocab_size: ids both models share; padded columns after it are left out.

    Raises:
        InputError: there is no response token.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = _load(student_folder, device), _load(teacher_folder, device)
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    sums: list[float] = []
    counts: list[int] = []
    for batch in _batches(order, sequences, tokens_per_batch):
        tokens_BS, mask_BS = _pad([sequences[i] for i in batch])
        tokens_BS, mask_BS = tokens_BS.to(device), mask_BS.to(device)
        kl_BS = _token_kl(student, teacher, tokens_BS, vocab_size) * mask_BS
        sums += kl_BS.sum(1).tolist()
        counts += mask_BS.sum(1).tolist()
    return _summary(sums, counts)


def _load(folder: str | Path, device: torch.device) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.to(device).eval()


def _batches(
    order: Sequence[int], sequences: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: int
) -> list[list[int]]:
    """Neighbours in ``order`` (by length) with at most ``tokens`` padded tokens together."""
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and (len(batches[-1]) + 1) * sum(map(len, sequences[index])) > tokens:
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]


def _pad(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """[B, S] ids and [B, S - 1] mask of the positions that predict a response token."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    tokens_BS = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask_BS = torch.zeros(len(sequences), longest - 1, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        tokens_BS[row, :end] = torch.tensor([*prompt, *response])
        mask_BS[row, len(prompt) - 1 : end - 1] = True
    return tokens_BS, mask_BS


@torch.no_grad()
def _token_kl(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens_BS: Tensor, vocab_size: int
) -> Tensor:
    """[B, S - 1] KL(student || teacher) at every position; padding is right of causal attention."""
    logq_BSV = student(tokens_BS).logits[:, :-1, :vocab_size].float().log_softmax(-1)
    logp_BSV = teacher(tokens_BS).logits[:, :-1, :vocab_size].float().log_softmax(-1)
    return (logq_BSV.exp() * (logq_BSV - logp_BSV)).sum(-1)


def _summary(sums: Sequence[float], counts: Sequence[int]) -> ReverseKLResult:
    tokens, n = sum(counts), len(counts)
    if not tokens:
        raise InputError("There is no response token to measure: give at least one prompt.")
    mean = sum(sums) / tokens
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    # Standard error of a ratio of sums over independent sequences.
    error = math.sqrt(squares * n / max(n - 1, 1)) / tokens
    return ReverseKLResult(mean, mean - _Z_95 * error, mean + _Z_95 * error, n, tokens)
