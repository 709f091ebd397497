r"""What depends on the whole batch: which tokens are trained, and rewards that look further.

A loss sees one token at a time. These functions take a number per token of this rank and give one
back, as if all ranks' tokens lay on one rank: the result does not depend on how they are dealt out.

Nothing asks a device for a number: how many tokens there are, the caller knows before.

Shape suffixes: T = tokens of this rank, N = tokens of all ranks, G = groups.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

_EPS = 1e-6
"""Added to a standard deviation, so that equal rewards become 0."""
_NO_KEY = torch.iinfo(torch.int64).max
"""Of what is no candidate; no token has it."""


def num_selected(share: float, total: int) -> int:
    """How many of ``total`` tokens a share is: rounded up, so that one is left of any."""
    # 0.1 x 30 is 3.0000000000000004 in floating point and still 3 tokens.
    return min(total, math.ceil(share * total - 1e-9))


def top_share(
    values_T: Tensor,
    count: int,
    candidates_T: Tensor,
    *,
    keys_T: Tensor,
    longest: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The tokens with the largest values of the global batch, exactly ``count`` of them.

    Args:
        values_T: [T] float32 what is compared, such as the student's entropy.
        count: at most the candidates of all ranks (:func:`num_selected`).
        candidates_T: [T] bool, the tokens to choose from.
        keys_T: [T] int64 a number that names each token in every layout; of equal values the
            lower key is taken.
        longest: no rank has more tokens; the same on every rank.
        group: the ranks that hold the other tokens; None: there are none.

    Returns:
        [T] bool, true for the chosen ones.

    Collectives: 1 all-gather of [longest, 2] int64.

    Source: entropy-based selection of TrOPD's ablation, arXiv 2606.01249, and of REOPOLD's second
    phase, arXiv 2603.11137.
    """
    if not count:
        return torch.zeros_like(candidates_T)
    # What is no candidate comes last: behind a candidate of -inf, too.
    compared_T = torch.where(candidates_T, values_T.double(), -torch.inf)
    named_T = torch.where(candidates_T, keys_T, _NO_KEY)
    values_N, keys_N = _gather(compared_T, named_T, longest, group)
    by_key = keys_N.argsort()
    last = by_key[values_N[by_key].argsort(stable=True, descending=True)][count - 1 : count]
    value, key = values_N.index_select(0, last), keys_N.index_select(0, last)
    return candidates_T & ((compared_T > value) | ((compared_T == value) & (keys_T <= key)))


def future_mean(
    rewards_T: Tensor,
    candidates_T: Tensor,
    *,
    rows_T: Tensor,
    positions_T: Tensor,
    shape: tuple[int, int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Reward plus the mean reward of the later tokens of the same trajectory.

    .. math:: r_t + \frac{1}{n - t} \sum_{s = t + 1}^{n} r_s

    Args:
        rewards_T: [T] float32.
        candidates_T: [T] bool, the tokens that have a reward (student tokens).
        rows_T: [T] int64 the trajectory of each token, counted on this rank.
        positions_T: [T] int64 place of each token in its trajectory, 0 and up.
        shape: trajectories of this rank, and places of the longest.
        group: the ranks that hold the other tokens of these trajectories; None: they are whole.

    Returns:
        [T] float32, the last token of a trajectory unchanged, 0 where there is no reward. An
        infinite reward stays what it is and is no part of a mean.

    Collectives: in a group 1 all-reduce (SUM) of [2, *shape] float64.

    Source: TOP-D, arXiv 2607.04751.
    """
    counted_T = candidates_T & rewards_T.isfinite()
    # Tables of trajectories x places: rewards and their number. The last column stays empty.
    rows, places = shape
    tables = rewards_T.new_zeros(2, rows, places + 1, dtype=torch.float64)
    tables[0].index_put_((rows_T, positions_T), torch.where(counted_T, rewards_T.double(), 0.0))
    tables[1].index_put_((rows_T, positions_T), counted_T.double())
    _sum(tables, group)
    later_T, number_T = tables.flip(-1).cumsum(-1).flip(-1)[:, rows_T, positions_T + 1]
    raised_T = rewards_T + later_T / number_T.clamp(min=1)
    return torch.where(candidates_T, raised_T, 0.0).to(rewards_T.dtype)


def early_weight(
    rewards_T: Tensor,
    candidates_T: Tensor,
    *,
    rows_T: Tensor,
    positions_T: Tensor,
    shape: tuple[int, int],
    gain: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""More weight for tokens before which student and teacher disagreed little.

    .. math:: 1 + g \left(1 - \frac{\sum_{s < t} |r_s|}{\sum_s |r_s|}\right)

    Args:
        rewards_T: [T] float32.
        candidates_T: [T] bool, the tokens that have a reward (student tokens).
        rows_T: [T] int64 the trajectory of each token, counted on this rank.
        positions_T: [T] int64 place of each token in its trajectory, 0 and up.
        shape: trajectories of this rank, and places of the longest.
        gain: g.
        group: the ranks that hold the other tokens of these trajectories; None: they are whole.

    Returns:
        [T] float32. An infinite reward is no part of a sum.

    Collectives: in a group 1 all-reduce (SUM) of [*shape] float64.

    Source: IW-OPD, arXiv 2606.22600.
    """
    counted_T = candidates_T & rewards_T.isfinite()
    rows, places = shape
    sizes = rewards_T.new_zeros(rows, places + 1, dtype=torch.float64)
    size_T = torch.where(counted_T, rewards_T.double().abs(), 0.0)
    sizes.index_put_((rows_T, positions_T + 1), size_T)
    _sum(sizes, group)
    before = sizes.cumsum(-1)
    # Without any disagreement nothing lies before a token, either.
    total_T = before[:, -1][rows_T].clamp(min=torch.finfo(torch.float64).tiny)
    return (1 + gain * (1 - before[rows_T, positions_T] / total_T)).to(rewards_T.dtype)


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
    finite_T = torch.where(counted_T, rewards_T.double(), 0.0)
    totals_2G = finite_T.new_zeros(2, num_groups)
    totals_2G[0].index_add_(0, groups_T, finite_T)
    totals_2G[1].index_add_(0, groups_T, counted_T.double())
    _sum(totals_2G, group)
    counts_G = totals_2G[1].clamp(min=1)
    mean_G = totals_2G[0] / counts_G
    squares_G = finite_T.new_zeros(num_groups)
    apart_T = torch.where(counted_T, finite_T - mean_G[groups_T], 0.0)
    squares_G.index_add_(0, groups_T, apart_T**2)
    _sum(squares_G, group)
    deviation_G = (squares_G / counts_G).sqrt() + _EPS
    standard_T = (rewards_T.double() - mean_G[groups_T]) / deviation_G[groups_T]
    return torch.where(candidates_T, standard_T, 0.0).to(rewards_T.dtype)


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or group.size() == 1


def _sum(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    if not _alone(group):
        dist.all_reduce(tensor, group=group)


def _gather(
    values_T: Tensor, keys_T: Tensor, longest: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """([N] float64, [N] int64) of every rank, one after the other, filled up to ``longest``."""
    if group is None or _alone(group):
        return values_T, keys_T
    # Two rows of 8 bytes a number, so that one collective moves both.
    mine = keys_T.new_full((2, longest), _NO_KEY)
    mine[0].view(torch.float64).fill_(-torch.inf)
    mine[0, : len(values_T)] = values_T.view(torch.int64)
    mine[1, : len(keys_T)] = keys_T
    everything = mine.new_empty(group.size(), 2, longest)
    dist.all_gather_into_tensor(everything.view(-1), mine.view(-1), group=group)
    return everything[:, 0].flatten().view(torch.float64), everything[:, 1].flatten()
