"""What ``tropd score`` keeps of a teacher's distribution.

Shape suffixes: T = tokens, K = top-k.
"""

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import FullSignal, teacher_statistics


def top_k_of(
    signal: FullSignal, ids_T: Tensor, k: int, *, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Reduce a distribution to the sampled token, the k most likely ones and the normaliser.

    Args:
        signal: the teacher at T tokens, this rank's shard.
        ids_T: [T] int64 the tokens of the trajectory.
        k: how many ids.
        group: the ranks that the vocabulary is sharded over.

    Returns:
        ``sampled_logprobs`` [T], ``logsumexp`` [T] of the logits, ``topk_ids`` [T, K] int64, most
        likely first, of equal ones the lower, and ``topk_logprobs`` [T, K]; float32, nats, the same
        on every rank.

    Collectives: those of :func:`~megatron_tropd.losses.teacher_statistics`.
    """
    seen = teacher_statistics(signal, ids_T, k, group=group)
    return {
        "sampled_logprobs": seen.teacher_logprob_T,
        "logsumexp": seen.teacher_normaliser_T2.sum(dim=-1),
        "topk_ids": seen.topk_ids_TK,
        "topk_logprobs": seen.topk_teacher_logprobs_TK,
    }
