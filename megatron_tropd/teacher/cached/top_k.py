"""What ``tropd score`` keeps of a teacher's distribution, some tokens at a time.

Shape suffixes: T = tokens, K = top-k, v = real columns of this rank's shard.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import FullSignal
from megatron_tropd.losses import vocab_parallel as vp

_BUDGET = {"cpu": 72 * 2**20}
_BUDGET_ELSEWHERE = 1024 * 2**20
"""Bytes of a chunk's logits."""


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

    Collectives: per chunk 2 all-gathers, of [t, 2] float32 and [t, K] int64, and 1 all-reduce (SUM)
    of [t, 1] float32.
    """
    shard = vp.shard_of(
        signal.width, vocab_size=signal.vocab_size, group=group, bounds=signal.bounds
    )
    budget = _BUDGET.get(ids_T.device.type, _BUDGET_ELSEWHERE)
    # Counted for the widest shard: every rank has as many chunks.
    rows = max(1, budget // (4 * shard.widest))
    shape = (min(rows, max(len(ids_T), 1)), shard.real)
    buffer = torch.empty(shape, dtype=torch.float32, device=ids_T.device)
    chunks = [slice(n, min(n + rows, len(ids_T))) for n in range(0, max(len(ids_T), 1), rows)]
    parts = [_chunk(signal, chunk, buffer, ids_T, k, shard) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunk(
    signal: FullSignal, rows: slice, buffer: Tensor, ids_T: Tensor, k: int, shard: vp.Shard
) -> dict[str, Tensor]:
    logits_tv = buffer[: rows.stop - rows.start]
    signal.write_logits(rows, logits_tv)
    normaliser_t2 = vp.normaliser(logits_tv, shard)
    sampled_t1 = vp.gather_columns(logits_tv, ids_T[rows].unsqueeze(-1), shard)
    found: dict[str, Any] = {
        "sampled_logprobs": vp.normalise(sampled_t1, normaliser_t2).squeeze(-1),
        "logsumexp": normaliser_t2.sum(dim=-1),
    }
    topk_tK, found["topk_ids"] = vp.top_k(logits_tv, k, vocab_size=shard.vocab_size, shard=shard)
    return found | {"topk_logprobs": vp.normalise(topk_tK, normaliser_t2)}
