"""What ``tropd score`` keeps of a teacher's distribution.

Shape suffixes: T = tokens, K = top-k.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import FullSignal, TopKSignal, reduce_signal


def top_k_of(
    signal: FullSignal | TopKSignal, ids_T: Tensor, k: int, *, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Reduce a distribution to the columns of a cache; see ``losses.reduce_signal``.

    A served teacher's is reduced already, to log-probs: logits whose logsumexp is 0.

    Returns:
        ``sampled_logprobs`` [T], ``logsumexp`` [T] of the logits, ``topk_ids`` [T, K] int64, most
        likely first, of equal ones the lower, and ``topk_logprobs`` [T, K]; float32, nats, the same
        on every rank.
    """
    if isinstance(signal, TopKSignal):
        reduced, logsumexp_T = signal, torch.zeros_like(signal.sampled_logprobs_T)
    else:
        reduced, logsumexp_T = reduce_signal(signal, ids_T, k, group=group)
    return {
        "sampled_logprobs": reduced.sampled_logprobs_T,
        "logsumexp": logsumexp_T,
        "topk_ids": reduced.topk_ids_TK,
        "topk_logprobs": reduced.topk_logprobs_TK,
    }
