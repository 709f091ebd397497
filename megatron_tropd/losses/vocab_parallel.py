"""Statistics of distributions whose vocabulary is sharded evenly over a process group.

Rank r of the group holds columns [r * v, (r + 1) * v). Columns from ``vocab_size`` on are padding
and never take part in anything. ``group = None`` means that one rank holds every column. The
functions up to :func:`unpack_top_k` are local building blocks, so that a caller can pack the
results of several into one collective; the rest are complete. None is differentiable: the losses
supply their own backward.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k,
R = ranks of the group.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_LOWEST_KEY = torch.iinfo(torch.int64).min
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1


def local_columns(
    width: int, *, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[int, int]:
    """Where this rank's shard starts and how many of its columns are real.

    Args:
        width: v, columns of the shard, padding included.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        (first column id, real columns); the second is 0 for a shard that is all padding.

    Raises:
        ValueError: the shards together have fewer columns than the vocabulary.
    """
    size = 1 if group is None else group.size()
    start = 0 if group is None else group.rank() * width
    if size * width < vocab_size:
        raise ValueError(
            f"Expected shards that hold all {vocab_size} columns of the vocabulary, found {size} "
            f"of {width} columns. Pass the group that shards the logits, or None for whole ones."
        )
    return start, min(max(vocab_size - start, 0), width)


def all_gather(values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor of every rank, stacked.

    Args:
        values: [...] same shape on every rank.
        group: the ranks.

    Returns:
        [R, ...]

    Collectives: 1 all-gather of ``values``; none without a group or for an empty tensor.
    """
    if group is None or group.size() == 1 or values.numel() == 0:
        size = 1 if group is None else group.size()
        return values.unsqueeze(0).expand(size, *values.shape)
    parts = values.new_empty((group.size(), *values.shape))
    dist.all_gather(list(parts.unbind(0)), values.contiguous(), group=group)
    return parts


def all_reduce_sum(values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks.

    Args:
        values: [...] same shape on every rank. Not modified.
        group: the ranks.

    Returns:
        [...] the same on every rank.

    Collectives: 1 all-reduce (SUM) of ``values``; none without a group or for an empty tensor.
    """
    if group is None or group.size() == 1 or values.numel() == 0:
        return values
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def max_and_sum_exp(columns_Tv: Tensor) -> Tensor:
    """Largest logit and sum of exp(logit - largest) over the given columns.

    Args:
        columns_Tv: [T, v] float32, real columns only; v may be 0.

    Returns:
        [T, 2] float32; (-inf, 0) where there is no column or all are -inf.
    """
    if columns_Tv.shape[-1] == 0:
        zeros_T = columns_Tv.new_zeros(columns_Tv.shape[0])
        return torch.stack([zeros_T - torch.inf, zeros_T], dim=-1)
    max_T = columns_Tv.amax(dim=-1)
    # -inf - -inf would be nan; any finite shift gives the right sum, 0.
    shift_T = torch.where(max_T == -torch.inf, 0.0, max_T)
    sum_T = (columns_Tv - shift_T.unsqueeze(-1)).exp().sum(dim=-1)
    return torch.stack([max_T, sum_T], dim=-1)


def combine_normalisers(stats_RT2: Tensor) -> Tensor:
    """Normaliser of the whole vocabulary from :func:`max_and_sum_exp` of each shard.

    Args:
        stats_RT2: [R, T, 2] float32.

    Returns:
        [T, 2] float32: largest logit and log of the sum of exp(logit - largest), nats.
    """
    max_RT, sum_RT = stats_RT2.unbind(dim=-1)
    max_T = max_RT.amax(dim=0)
    log_sum_T = (sum_RT * (max_RT - max_T).exp()).sum(dim=0).log()
    return torch.stack([max_T, log_sum_T], dim=-1)


def normalise(logits_TK: Tensor, normaliser_T2: Tensor) -> Tensor:
    """Log-probabilities of logits.

    Args:
        logits_TK: [T, K] float32, any columns. Not modified.
        normaliser_T2: [T, 2] float32 from :func:`combine_normalisers`.

    Returns:
        [T, K] float32, nats.
    """
    # Two subtractions: max + log_sum would round to the precision of the largest logit.
    return (logits_TK - normaliser_T2[:, :1]).sub_(normaliser_T2[:, 1:])


def pick_columns(columns_Tv: Tensor, ids_TK: Tensor, *, start: int) -> Tensor:
    """Logits at given global ids, 0 where another rank holds the column.

    Args:
        columns_Tv: [T, v] float32, real columns only; v may be 0.
        ids_TK: [T, K] int64 global column ids.
        start: global id of the first column.

    Returns:
        [T, K] float32; summed over the ranks it is the logit, without rounding.
    """
    if columns_Tv.shape[-1] == 0:
        return columns_Tv.new_zeros(ids_TK.shape)
    local_TK, mine_TK = local_ids(ids_TK, start=start, columns=columns_Tv.shape[-1])
    return torch.where(mine_TK, columns_Tv.gather(-1, local_TK), 0.0)


def local_ids(ids_TK: Tensor, *, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Global ids as indices into this rank's columns.

    Args:
        ids_TK: [T, K] int64 global column ids.
        start: global id of the first column.
        columns: real columns here.

    Returns:
        ([T, K] int64 index, 0 where not held; [T, K] bool whether held here).
    """
    local_TK = ids_TK - start
    mine_TK = (local_TK >= 0) & (local_TK < columns)
    return torch.where(mine_TK, local_TK, 0), mine_TK


def pack_top_k(columns_Tv: Tensor, k: int, *, start: int) -> Tensor:
    """The k largest logits of these columns as sortable int64 keys.

    A key holds the order-preserving bits of the float32 logit above the complement of the id, so
    comparing keys compares logits first and prefers the lower id on ties. No two keys are equal:
    the k largest of all shards are the same set in the same order however the columns are cut.

    Args:
        columns_Tv: [T, v] float32, real columns only; v may be 0.
        k: keys per token.
        start: global id of the first column.

    Returns:
        [T, k] int64, descending; filled with the lowest key where v < k.
    """
    num = columns_Tv.shape[-1]
    # + 0.0 makes -0.0 equal to 0.0, as it is for comparisons.
    ordered_Tv = _flip_negative((columns_Tv + 0.0).view(torch.int32))
    ids_v = torch.arange(start, start + num, device=columns_Tv.device)
    keys_Tv = ordered_Tv.long().bitwise_left_shift_(_ID_BITS).bitwise_or_(_ID_MASK - ids_v)
    keys_TK = keys_Tv.topk(min(k, num), dim=-1).values
    return torch.nn.functional.pad(keys_TK, (0, k - keys_TK.shape[-1]), value=_LOWEST_KEY)


def merge_top_k(keys_RTK: Tensor) -> Tensor:
    """The k largest keys of all shards.

    Args:
        keys_RTK: [R, T, k] int64 from :func:`pack_top_k` of each rank.

    Returns:
        [T, k] int64, descending.
    """
    num_ranks, _, k = keys_RTK.shape
    if num_ranks == 1:
        return keys_RTK[0]
    return keys_RTK.transpose(0, 1).flatten(1, 2).topk(k, dim=-1).values


def unpack_top_k(keys_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ids of keys, exactly as they went in.

    Args:
        keys_TK: [T, k] int64.

    Returns:
        ([T, k] float32 logits, [T, k] int64 global ids).
    """
    ids_TK = _ID_MASK - (keys_TK & _ID_MASK)
    bits_TK = _flip_negative((keys_TK >> _ID_BITS).to(torch.int32))
    return bits_TK.view(torch.float32), ids_TK


def _flip_negative(bits: Tensor) -> Tensor:
    """[...] int32 float bits <-> integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def real_columns(
    logits_Tv: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, int]:
    """This rank's logits without padding, in float32.

    Args:
        logits_Tv: [T, v] any float dtype. Not modified.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        ([T, real columns] float32, detached, a view where nothing had to be converted;
        global id of the first column).
    """
    start, real = local_columns(logits_Tv.shape[-1], vocab_size=vocab_size, group=group)
    return logits_Tv.detach()[:, :real].float(), start


def normaliser(logits_Tv: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """What :func:`normalise` subtracts to turn logits into log-probabilities.

    Args:
        logits_Tv: [T, v] any float dtype, this rank's shard. Not modified.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        [T, 2] float32, the same on every rank.

    Collectives: 1 all-gather of [T, 2] float32.
    """
    columns_Tv, _ = real_columns(logits_Tv, vocab_size=vocab_size, group=group)
    return combine_normalisers(all_gather(max_and_sum_exp(columns_Tv), group=group))


def gather_columns(
    logits_Tv: Tensor, ids_TK: Tensor, *, vocab_size: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Logits at given global ids.

    Args:
        logits_Tv: [T, v] any float dtype, this rank's shard. Not modified.
        ids_TK: [T, K] int64 global ids below ``vocab_size``, the same on every rank.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        [T, K] float32, the same on every rank.

    Collectives: 1 all-reduce (SUM) of [T, K] float32.
    """
    columns_Tv, start = real_columns(logits_Tv, vocab_size=vocab_size, group=group)
    return all_reduce_sum(pick_columns(columns_Tv, ids_TK, start=start), group=group)


def top_k(
    logits_Tv: Tensor, k: int, *, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The k largest logits of the whole vocabulary, exact; ties go to the lower id.

    Args:
        logits_Tv: [T, v] any float dtype, this rank's shard. Not modified.
        k: 1 <= k <= ``vocab_size``.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.

    Returns:
        ([T, k] float32 logits descending, [T, k] int64 global ids), the same on every rank and
        however the vocabulary is sharded.

    Raises:
        ValueError: k is larger than the vocabulary.

    Collectives: 1 all-gather of [T, k] int64.
    """
    if not 1 <= k <= vocab_size:
        raise ValueError(f"Expected 1 <= k <= {vocab_size} (the vocabulary), found k = {k}.")
    columns_Tv, start = real_columns(logits_Tv, vocab_size=vocab_size, group=group)
    keys_TK = pack_top_k(columns_Tv, k, start=start)
    return unpack_top_k(merge_top_k(all_gather(keys_TK, group=group)))
