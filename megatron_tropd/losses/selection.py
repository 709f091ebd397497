r"""What depends on the whole batch: which tokens are trained, and rewards that look further.

A loss sees one token at a time. These functions take a number per token of this rank and give one
back, as if all ranks' tokens lay on one rank: the result does not depend on how they are dealt out.

Shape suffixes: T = tokens of this rank, N = tokens of all ranks, G = groups.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

_EPS = 1e-6
"""Added to a standard deviation, so that equal rewards become 0."""


def num_selected(share: float, total: int) -> int:
    """How many of ``total`` tokens a share is: rounded up, so that one is left of any."""
    # 0.1 x 30 is 3.0000000000000004 in floating point and still 3 tokens.
    return min(total, math.ceil(share * total - 1e-9))


def top_share(
    values_T: Tensor,
    share: float,
    candidates_T: Tensor,
    *,
    keys_T: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The tokens with the largest values of the global batch, exactly ``num_selected`` of them.

    Args:
        values_T: [T] float32 what is compared, such as the student's entropy.
        share: of all candidates, in (0, 1].
        candidates_T: [T] bool, the tokens to choose from.
        keys_T: [T] int64 a number that names each token in every layout; of equal values the
            lower key is taken.
        group: the ranks that hold the other tokens; None: there are none.

    Returns:
        [T] bool, true for the chosen ones.

    Collectives: 2 all-gathers, of [1] and of [largest T, 2] int64.

    Source: entropy-based selection of TrOPD's ablation, arXiv 2606.01249, and of REOPOLD's second
    phase, arXiv 2603.11137.
    """
    chosen = values_T[candidates_T].double()
    # Two columns of 8 bytes, so that one collective moves both.
    mine_T2 = torch.stack([chosen.view(torch.int64), keys_T[candidates_T]], dim=-1)
    all_N2 = _gather_rows(mine_T2, group)
    count = num_selected(share, len(all_N2))
    if not count:
        return torch.zeros_like(candidates_T)
    values_N, keys_N = all_N2[:, 0].contiguous().view(torch.float64), all_N2[:, 1]
    by_key = keys_N.argsort()
    last = by_key[values_N[by_key].argsort(stable=True, descending=True)][count - 1]
    larger_T = values_T.double() > values_N[last]
    equal_T = values_T.double() == values_N[last]
    return candidates_T & (larger_T | (equal_T & (keys_T <= keys_N[last])))


def future_mean(
    rewards_T: Tensor, candidates_T: Tensor, *, rows_T: Tensor, positions_T: Tensor
) -> Tensor:
    r"""Reward plus the mean reward of the later tokens of the same trajectory.

    .. math:: r_t + \frac{1}{n - t} \sum_{s = t + 1}^{n} r_s

    Args:
        rewards_T: [T] float32.
        candidates_T: [T] bool, the tokens that have a reward (student tokens).
        rows_T: [T] int64 the trajectory of each token; trajectories are whole.
        positions_T: [T] int64 place of each token in its trajectory, 0 and up.

    Returns:
        [T] float32, the last token of a trajectory unchanged, 0 where there is no reward. An
        infinite reward stays what it is and is no part of a mean.

    Collectives: none.

    Source: TOP-D, arXiv 2607.04751.
    """
    if not len(rewards_T):
        return rewards_T.clone()
    counted_T = candidates_T & rewards_T.isfinite()
    # Tables of trajectories x places: rewards and their number. The last column stays empty.
    rows_T = rows_T.unique(return_inverse=True)[1]
    shape = (2, int(rows_T.max()) + 1, int(positions_T.max()) + 2)
    tables = rewards_T.new_zeros(shape, dtype=torch.float64)
    at = rows_T[counted_T], positions_T[counted_T]
    tables[0][at] = rewards_T[counted_T].double()
    tables[1][at] = 1.0
    later_T, number_T = tables.flip(-1).cumsum(-1).flip(-1)[:, rows_T, positions_T + 1]
    raised_T = rewards_T + later_T / number_T.clamp(min=1)
    return torch.where(candidates_T, raised_T, 0.0).to(rewards_T.dtype)


def group_normalise(
    rewards_T: Tensor,
    candidates_T: Tensor,
    groups_T: Tensor,
    *,
    num_groups: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Rewards standardised within each group: minus the mean, over the standard deviation.

    Args:
        rewards_T: [T] float32.
        candidates_T: [T] bool, the tokens that have a reward (student tokens).
        groups_T: [T] int64 the group of each token (its prompt), 0 <= group < num_groups, counted
            the same on every rank.
        num_groups: G.
        group: the ranks that hold the other tokens; None: there are none.

    Returns:
        [T] float32, 0 where there is no reward and in groups of equal rewards. An infinite reward
        stays what it is and moves no other.

    Collectives: 2 all-reduces (SUM), of [2, G] and of [G] float64.

    Source: TOP-D, arXiv 2607.04751.
    """
    counted_T = candidates_T & rewards_T.isfinite()
    counted = rewards_T[counted_T].double()
    groups = groups_T[counted_T]
    totals_2G = counted.new_zeros(2, num_groups)
    totals_2G[0].index_add_(0, groups, counted)
    totals_2G[1].index_add_(0, groups, torch.ones_like(counted))
    _sum(totals_2G, group)
    counts_G = totals_2G[1].clamp(min=1)
    mean_G = totals_2G[0] / counts_G
    squares_G = counted.new_zeros(num_groups)
    squares_G.index_add_(0, groups, (counted - mean_G[groups]) ** 2)
    _sum(squares_G, group)
    deviation_G = (squares_G / counts_G).sqrt() + _EPS
    standard_T = (rewards_T.double() - mean_G[groups_T]) / deviation_G[groups_T]
    return torch.where(candidates_T, standard_T, 0.0).to(rewards_T.dtype)


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or group.size() == 1


def _sum(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    if not _alone(group):
        dist.all_reduce(tensor, group=group)


def _gather_rows(mine_T2: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N, 2] every rank's rows, one rank after the other."""
    if group is None or _alone(group):
        return mine_T2
    size = group.size()
    counts = mine_T2.new_empty(size)
    dist.all_gather_into_tensor(counts, mine_T2.new_tensor([len(mine_T2)]), group=group)
    lengths = counts.tolist()
    if not any(lengths):
        return mine_T2
    padded = mine_T2.new_zeros(max(lengths), 2)
    padded[: len(mine_T2)] = mine_T2
    everything = mine_T2.new_empty(size * max(lengths), 2)
    dist.all_gather_into_tensor(everything, padded, group=group)
    parts = everything.view(size, -1, 2)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
