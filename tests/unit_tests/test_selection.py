"""Batch-wide selection and rewards: right by hand, and the same however tokens are dealt out."""

import math

import pytest
import torch

from megatron_tropd.losses.selection import (
    future_mean,
    group_normalise,
    num_selected,
    top_share,
)
from tests.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [(0.2, 10, 2), (0.1, 30, 3), (0.2, 11, 3), (0.2, 1, 1), (0.2, 0, 0), (1.0, 7, 7), (0.7, 10, 7)],
)
def test_a_share_is_rounded_up(share, total, expected):
    assert num_selected(share, total) == expected


def test_the_largest_values_are_chosen_among_the_candidates():
    values = torch.tensor([5.0, 1.0, 9.0, 4.0, 3.0, 8.0])
    candidates = torch.tensor([True, True, False, True, True, True])
    chosen = top_share(values, 2, candidates, keys_T=torch.arange(6), longest=6, group=None)
    assert chosen.tolist() == [True, False, False, False, False, True]


def test_ties_go_to_the_lower_key_whatever_the_order():
    values, keys = torch.tensor([1.0, 2.0, 1.0, 1.0, -0.0, 0.0]), torch.tensor([7, 9, 3, 5, 1, 0])
    candidates = torch.ones(6, dtype=torch.bool)
    for order in (torch.arange(6), torch.tensor([3, 5, 0, 1, 4, 2])):
        how = dict(keys_T=keys[order], longest=6, group=None)
        chosen = top_share(values[order], 3, candidates, **how)
        assert sorted(keys[order][chosen].tolist()) == [3, 5, 9]
        chosen = top_share(values[order], 5, candidates, **how)
        assert sorted(keys[order][chosen].tolist()) == [0, 3, 5, 7, 9]


def test_no_candidates_and_no_tokens_give_none():
    none = torch.zeros(3, dtype=torch.bool)
    how = dict(longest=3, group=None)
    assert top_share(torch.rand(3), 0, none, keys_T=torch.arange(3), **how).sum() == 0
    empty = torch.zeros(0)
    nothing = empty.bool(), empty.long()
    assert top_share(empty, 0, nothing[0], keys_T=nothing[1], **how).shape == (0,)
    at = dict(rows_T=nothing[1], positions_T=nothing[1], shape=(0, 0))
    assert future_mean(empty, nothing[0], **at).shape == (0,)
    assert group_normalise(empty, *nothing, num_groups=2, group=None).shape == (0,)


def test_what_is_no_candidate_comes_behind_the_lowest_value():
    values, candidates = torch.full((4,), -math.inf), torch.tensor([False, True, True, False])
    for count, expected in ((1, [False, True, False, False]), (2, [False, True, True, False])):
        how = dict(keys_T=torch.arange(4), longest=9, group=None)
        assert top_share(values, count, candidates, **how).tolist() == expected


def test_future_mean_by_hand():
    rewards = torch.tensor([9.0, 1.0, 2.0, 4.0, 5.0, 7.0])
    candidates = torch.tensor([False, True, True, True, True, True])
    rows, positions = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 3, 0, 4])
    at = dict(rows_T=rows, positions_T=positions, shape=(2, 5))
    found = future_mean(rewards, candidates, **at)
    assert found.tolist() == [0.0, 1 + 3.0, 2 + 4.0, 4.0, 5 + 7.0, 7.0]
    rewards[3] = -math.inf
    found = future_mean(rewards, candidates, **at)
    assert found.tolist() == [0.0, 1 + 2.0, 2.0, -math.inf, 12.0, 7.0]


def test_group_normalise_by_hand():
    rewards = torch.tensor([1.0, 3.0, 100.0, 5.0, 5.0, -math.inf])
    candidates = torch.tensor([True, True, False, True, True, True])
    groups = torch.tensor([0, 0, 0, 2, 2, 0])
    found = group_normalise(rewards, candidates, groups, num_groups=3, group=None)
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, -math.inf])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def _tokens(num: int = 61) -> dict[str, torch.Tensor]:
    """Tokens of a global batch; entropies of few values, so that ties reach over ranks."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 9, (num,), generator=generator).sort().values
    return {
        "values": torch.randint(0, 6, (num,), generator=generator) / 4,
        "rewards": torch.randn(num, generator=generator),
        "candidates": torch.rand(num, generator=generator) < 0.8,
        "keys": rows * 2**20 + torch.arange(num),
        "groups": rows % 4,
    }


def _all_of_them(tokens: dict[str, torch.Tensor], group, total: int) -> list[torch.Tensor]:
    candidates, how = tokens["candidates"], dict(keys_T=tokens["keys"], longest=64, group=group)
    chosen = [
        top_share(tokens["values"], num_selected(share, total), candidates, **how)
        for share in (0.2, 0.33, 1.0)
    ]
    standard = group_normalise(
        tokens["rewards"], candidates, tokens["groups"], num_groups=4, group=group
    )
    return [*chosen, standard]


def _dealt_out(group) -> None:
    tokens = _tokens()
    total = int(tokens["candidates"].sum())
    whole = _all_of_them(tokens, None, total)
    assert [int(chosen.sum()) for chosen in whole[:3]] == [
        num_selected(share, total) for share in (0.2, 0.33, 1.0)
    ]
    size, rank = group.size(), group.rank()
    owners = torch.randint(0, size, (61,), generator=torch.Generator().manual_seed(4))
    lonely = torch.zeros_like(owners)  # one rank has every token, the others none
    for owner in (torch.arange(61) % size, owners, lonely):
        mine = (owner == rank).nonzero()[:, 0]
        part = _all_of_them({name: value[mine] for name, value in tokens.items()}, group, total)
        for found, expected in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(found, expected[mine])
        torch.testing.assert_close(part[3], whole[3][mine], rtol=1e-6, atol=1e-7)
    nobody = {name: value[:0] for name, value in tokens.items()}
    assert all(found.shape == (0,) for found in _all_of_them(nobody, group, 0))


def test_dealing_the_tokens_out_changes_nothing():
    run_on_ranks(4, _dealt_out)
