"""Statistics of distributions whose vocabulary is sharded over a process group.

Rank r of the group holds columns [r * v, (r + 1) * v), or those that ``bounds`` names. Columns from
``vocab_size`` on are padding and never take part in anything. ``group = None`` means that one rank
holds every column. The functions are local building blocks, so that a caller can pack the results
of several into one collective. None is differentiable: the losses supply their own backward.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k,
R = ranks of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

_LOWEST_KEY = torch.iinfo(torch.int64).min
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_GROUP = 32
"""Columns of which only the largest is looked at first. Measured: 64 and 128 take longer."""


@dataclass(frozen=True)
class Shard:
    """Which columns of the vocabulary this rank holds."""

    start: int
    """Global id of the first column."""
    real: int
    """Real columns; 0 for a shard that is all padding."""
    group: dist.ProcessGroup | None
    """The ranks that hold the others; None: there are none."""
    bounds: tuple[int, ...]
    """R + 1 column ids: rank r holds the real columns bounds[r] to bounds[r + 1]."""

    @property
    def vocab_size(self) -> int:
        """Real columns of all ranks together."""
        return self.bounds[-1]

    @property
    def stop(self) -> int:
        """Global id after the last real column."""
        return self.start + self.real

    @property
    def widest(self) -> int:
        """Real columns of the rank that holds most: the same on every rank.

        What decides how often ranks talk, or about how much, follows from this, never from
        :attr:`real`.
        """
        return max(stop - start for start, stop in pairwise(self.bounds))


def shard_of(
    width: int,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    bounds: Sequence[int] | None = None,
) -> Shard:
    """This rank's part of the vocabulary.

    Args:
        width: v, columns of the shard, padding included.
        vocab_size: real columns of the whole vocabulary.
        group: the ranks the vocabulary is sharded over.
        bounds: R + 1 column ids; rank r holds columns bounds[r] to bounds[r + 1]. None: shards of
            equal width.

    Returns:
        The shard.

    Raises:
        ValueError: the shards together have fewer columns than the vocabulary, or ``bounds`` does
            not describe them.
    """
    size, rank = place_in(group)
    if bounds is None:
        bounds = range(0, (size + 1) * width, width) if width else (0,) * (size + 1)
    check_bounds(bounds, group, width)
    if bounds[-1] < vocab_size:
        raise ValueError(
            f"Expected shards that hold all {vocab_size} columns of the vocabulary, found "
            f"{bounds[-1]} in {size}. Pass the group that shards the logits, or None for whole "
            "ones."
        )
    real = tuple(min(bound, vocab_size) for bound in bounds)
    return Shard(bounds[rank], real[rank + 1] - real[rank], group, real)


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(Ranks of the group, number of this one)."""
    return (1, 0) if group is None else (group.size(), group.rank())


def check_bounds(
    bounds: Sequence[int], group: dist.ProcessGroup | None, width: int | None = None
) -> None:
    """Raise ValueError if bounds do not describe the group, or the columns of this rank."""
    size, rank = place_in(group)
    ascending = all(a <= b for a, b in pairwise(bounds))
    if len(bounds) != size + 1 or bounds[0] != 0 or not ascending:
        raise ValueError(
            f"Expected bounds of {size} shards, {size + 1} ascending column ids that start at 0, "
            f"found {list(bounds)}. Give each rank the columns after those of the rank before it."
        )
    if width not in (None, bounds[rank + 1] - bounds[rank]):
        raise ValueError(
            f"Expected a shard of {bounds[rank + 1] - bounds[rank]} columns on rank {rank} (bounds "
            f"{list(bounds)}), found {width}. Give the bounds of these very tensors."
        )


def equal_bounds(vocab_size: int, ranks: int) -> list[int]:
    """Bounds of shards as equal as can be, without padding: the first ones get one more."""
    share, more = divmod(vocab_size, ranks)
    return [0, *accumulate(share + (rank < more) for rank in range(ranks))]


class AllGather:
    """The tensor of every rank, stacked, as a collective that runs while others compute."""

    def __init__(self, values: Tensor, *, group: dist.ProcessGroup | None) -> None:
        """Start it, of a tensor that has the same shape on every rank.

        Collectives: 1 all-gather of ``values``; none without a group or for an empty tensor.
        """
        self._work = None
        size, _ = place_in(group)
        if size == 1 or values.numel() == 0:
            self._parts = values.unsqueeze(0).expand(size, *values.shape)
            return
        self._values = values.contiguous()  # has to outlive the collective
        self._parts = values.new_empty((size, *values.shape))
        self._work = dist.all_gather_into_tensor(
            self._parts.view(-1), self._values.view(-1), group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """Wait for the gathered parts, [R, ...]."""
        if self._work is not None:
            self._work.wait()
        return self._parts


class AllReduceSum:
    """The sum over the ranks, as a collective that runs while others compute."""

    def __init__(self, values: Tensor, *, group: dist.ProcessGroup | None) -> None:
        """Start it, of a tensor that has the same shape on every rank and is not modified.

        Collectives: 1 all-reduce (SUM) of ``values``; none without a group or for an empty tensor.
        """
        self._work, self._total = None, values
        if place_in(group)[0] == 1 or values.numel() == 0:
            return
        self._total = values.clone(memory_format=torch.contiguous_format)
        self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def wait(self) -> Tensor:
        """[...] the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return self._total


def all_reduce_sum(values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """[...] the sum over the ranks. Collectives: see :class:`AllReduceSum`."""
    return AllReduceSum(values, group=group).wait()


def combine_normalisers(stats_RT2: Tensor) -> Tensor:
    """[T, 2] normaliser of the whole vocabulary from ``passes.max_and_sum_exp`` of each shard.

    It is the largest logit and the log of the sum of exp(logit - largest).
    """
    max_RT, sum_RT = stats_RT2.unbind(dim=-1)
    max_T = max_RT.amax(dim=0)
    log_sum_T = (sum_RT * (max_RT - max_T).exp()).sum(dim=0).log()
    return torch.stack([max_T, log_sum_T], dim=-1)


def normalise(logits_TK: Tensor, normaliser_T2: Tensor) -> Tensor:
    """[T, K] log-probabilities in nats of logits at any columns (:func:`combine_normalisers`)."""
    # Two subtractions: max + log_sum would round to the precision of the largest logit.
    return (logits_TK - normaliser_T2[:, :1]).sub_(normaliser_T2[:, 1:])


def pick_columns(columns_Tv: Tensor, ids_TK: Tensor, shard: Shard) -> Tensor:
    """Logits at given global ids, 0 where another rank holds the column, nan where none does.

    Args:
        columns_Tv: [T, v] float32, real columns only; v may be 0.
        ids_TK: [T, K] int64 global column ids.
        shard: where the columns lie.

    Returns:
        [T, K] float32; summed over the ranks it is the logit, without rounding. An id that is no
        column of the vocabulary (-100, padding) gives nan on every rank: a GPU is not asked
        whether there is one, and 0 would be a likely token.
    """
    known_TK = (ids_TK >= 0) & (ids_TK < shard.vocab_size)
    elsewhere_TK = columns_Tv.new_zeros(ids_TK.shape).masked_fill_(~known_TK, torch.nan)
    if columns_Tv.shape[-1] == 0:
        return elsewhere_TK
    local_TK, mine_TK = local_ids(ids_TK, start=shard.start, columns=columns_Tv.shape[-1])
    return torch.where(mine_TK, columns_Tv.gather(-1, local_TK), elsewhere_TK)


def local_ids(ids_TK: Tensor, *, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """([T, K] int64 index of global ids among this rank's columns, 0 if not held; whether held)."""
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
    if k * _GROUP < num:
        columns_TK = _candidates(columns_Tv, k)
        values_TK = columns_Tv.gather(-1, columns_TK.clamp(max=num - 1))
    else:
        columns_TK = torch.arange(num, device=columns_Tv.device).expand_as(columns_Tv)
        values_TK = columns_Tv
    keys_TK = _keys(values_TK, columns_TK, start).masked_fill(columns_TK >= num, _LOWEST_KEY)
    if num > k:
        return keys_TK.topk(k, dim=-1).values
    keys_TK = keys_TK.sort(dim=-1, descending=True).values
    return torch.nn.functional.pad(keys_TK, (0, k - num), value=_LOWEST_KEY)


def _candidates(columns_Tv: Tensor, k: int) -> Tensor:
    """The columns of the k groups with the largest logits, among which are the k largest logits.

    Were one of these in another group, each of the k groups would hold a logit that comes before
    it: a larger one, or an equal one of a lower column. So a few thousand columns are sorted in
    place of the vocabulary, as keys: equal logits, which most rows of bfloat16 have at any place,
    cost nothing more. [T, k * _GROUP] int64; columns from v on do not exist.
    """
    whole = columns_Tv.shape[-1] // _GROUP * _GROUP
    largest_TG = columns_Tv[:, :whole].unflatten(-1, (-1, _GROUP)).amax(dim=-1)
    if whole < columns_Tv.shape[-1]:
        rest_T1 = columns_Tv[:, whole:].amax(dim=-1, keepdim=True)
        largest_TG = torch.cat([largest_TG, rest_T1], dim=-1)
    numbers_G = torch.arange(largest_TG.shape[-1], device=columns_Tv.device)
    keys_Tk = _keys(largest_TG, numbers_G, 0).topk(k, dim=-1, sorted=False).values
    groups_Tk1 = (_ID_MASK - (keys_Tk & _ID_MASK)).unsqueeze(-1)
    return (groups_Tk1 * _GROUP + torch.arange(_GROUP, device=columns_Tv.device)).flatten(-2)


def _keys(values_TK: Tensor, columns_TK: Tensor, start: int) -> Tensor:
    """Sortable keys of logits at some columns: see :func:`pack_top_k`."""
    # + 0.0 makes -0.0 equal to 0.0, as it is for comparisons.
    ordered_TK = _flip_negative((values_TK + 0.0).view(torch.int32)).long()
    return (ordered_TK << _ID_BITS) | (_ID_MASK - start - columns_TK)


def merge_top_k(keys_RTK: Tensor, values_RTK: Tensor) -> tuple[Tensor, Tensor]:
    """([T, k] largest keys of all shards, descending; [T, k] what came with each)."""
    num_ranks, _, k = keys_RTK.shape
    if num_ranks == 1 or k == 0:
        return keys_RTK[0], values_RTK[0]
    merged = keys_RTK.transpose(0, 1).flatten(1, 2).topk(k, dim=-1)
    values = values_RTK.transpose(0, 1).flatten(1, 2).gather(-1, merged.indices)
    return merged.values, values


def unpack_top_k(keys_TK: Tensor) -> tuple[Tensor, Tensor]:
    """([T, k] float32 logits, [T, k] int64 global ids) of keys, exactly as they went in."""
    ids_TK = _ID_MASK - (keys_TK & _ID_MASK)
    bits_TK = _flip_negative((keys_TK >> _ID_BITS).to(torch.int32))
    return bits_TK.view(torch.float32), ids_TK


def _flip_negative(bits: Tensor) -> Tensor:
    """[...] int32 float bits <-> integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
