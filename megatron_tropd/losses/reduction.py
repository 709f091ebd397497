"""A distribution reduced to what other ranks, or a file, need to know of it.

Shape suffixes: T = all tokens, t = tokens of a chunk, K = top-k, v = real columns of this rank's
shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses import vocab_parallel as vp
from megatron_tropd.losses.checks import shard_of_signal
from megatron_tropd.losses.dense import Scratch
from megatron_tropd.losses.signals import FullSignal, LogitsSignal, TopKSignal
from megatron_tropd.losses.statistics import bits_as, own_part
from megatron_tropd.losses.tensors import check_ids, check_tensors

_BUDGET = {"cpu": 72 * 2**20}
_BUDGET_ELSEWHERE = 1024 * 2**20
"""Bytes of a chunk's logits."""


@dataclass(frozen=True)
class _Ids:
    ids_T: Tensor


@torch.no_grad()
def reduce_signal(
    signal: FullSignal, ids_T: Tensor, k: int, *, group: dist.ProcessGroup | None
) -> tuple[TopKSignal, Tensor]:
    """Reduce a distribution to the sampled token, the k most likely ones and the normaliser.

    Args:
        signal: the teacher at T tokens, this rank's shard.
        ids_T: [T] int64 the tokens of the trajectory.
        k: how many ids.
        group: the ranks that the vocabulary is sharded over.

    Returns:
        The signal, of equal ids the lower first, and [T] float32 logsumexp of the logits, nats; the
        same on every rank.

    Raises:
        ValueError: k is larger than the vocabulary, a tensor has another shape or type, or, on a
            CPU, an id is outside the vocabulary. On a GPU the log-prob of that token is nan.

    Collectives: per chunk 1 all-gather of [t, 3 + 2 K] 32-bit words.
    """
    check_tensors(teacher=signal, targets=_Ids(ids_T))
    check_ids(ids_T, signal.vocab_size, "targets.ids_T")
    if not 1 <= k <= signal.vocab_size:
        raise ValueError(f"Expected 1 <= k <= {signal.vocab_size} (the vocabulary), found k = {k}.")
    shard, num = shard_of_signal(signal, group, "teacher"), len(ids_T)
    budget = _BUDGET.get(ids_T.device.type, _BUDGET_ELSEWHERE)
    # Counted for the widest shard: every rank has as many chunks.
    rows = min(max(1, budget // (4 * shard.widest)), max(num, 1))
    buffer_tv = torch.empty(rows, shard.real, dtype=torch.float32, device=ids_T.device)
    scratch = Scratch(shard.real, ids_T.device, budget=budget, widest=shard.widest)
    parts = []
    for begin in range(0, max(num, 1), rows):
        chunk = slice(begin, min(begin + rows, num))
        logits_tv = buffer_tv[: chunk.stop - begin]
        signal.write_logits(chunk, logits_tv)
        parts.append(_reduced(logits_tv, ids_T[chunk], k, shard, scratch))
    *signals, logsumexp_T = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return TopKSignal(*signals), logsumexp_T


def top_k_signal(
    logits_Tv: Tensor,
    ids_T: Tensor,
    k: int,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    bounds: Sequence[int] | None = None,
) -> TopKSignal:
    """:func:`reduce_signal` of teacher logits [T, v], of any float dtype and not modified.

    ``vocab_size`` is the real columns of the whole vocabulary, ``bounds`` the R + 1 column ids of
    the shards; None: shards of equal width.
    """
    teacher = LogitsSignal(logits_Tv, vocab_size, None if bounds is None else tuple(bounds))
    return reduce_signal(teacher, ids_T, k, group=group)[0]


def _reduced(
    logits_tv: Tensor, ids_t: Tensor, k: int, shard: vp.Shard, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[t] log-probs of the tokens, [t, K] ids and log-probs of the top-k, [t] logsumexp."""
    keys_tK = vp.pack_top_k(logits_tv, k, start=shard.start)
    own_t3 = own_part(logits_tv, ids_t, shard, scratch)
    bits_tn = torch.cat([keys_tK.view(torch.int32), own_t3.view(torch.int32)], dim=-1)
    bits_Rtn = vp.AllGather(bits_tn, group=shard.group).wait()
    keys_RtK = bits_as(torch.int64, bits_Rtn[..., : 2 * k])
    own_Rt3 = bits_as(torch.float32, bits_Rtn[..., 2 * k :])
    norm_t2 = vp.combine_normalisers(own_Rt3[..., 1:])
    sampled_t1 = vp.normalise(own_Rt3[..., :1].sum(dim=0), norm_t2)
    topk_tK, topk_ids_tK = vp.unpack_top_k(vp.merge_top_k(keys_RtK, keys_RtK)[0])
    logprobs_tK = vp.normalise(topk_tK, norm_t2)
    return sampled_t1.squeeze(-1), topk_ids_tK, logprobs_tK, norm_t2.sum(dim=-1)
