"""Keyed random numbers: a fixed function of the key, uniform, independent between keys."""

import numpy as np
import pytest

from megatron_tropd.losses.draws import Purpose, keyed_seed, keyed_uniform

FROZEN_SEED = 1244103189087324996
FROZEN_UNIFORMS = [14815816, 820704, 3570285, 9481012]


def _splitmix64(state):
    """First output of the published generator, in Python integers."""
    word = (state + 0x9E3779B97F4A7C15) % 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def test_published_splitmix64_value():
    # One zero element: state 1 + golden, xor 0, finalised: SplitMix64 seeded with 1.
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    assert keyed_seed(0) == _splitmix64(1) >> 1


def test_frozen_values():
    """A run resumed by a newer version must draw the same numbers."""
    assert keyed_seed(1234, Purpose.ROLLOUT, 7, 3, 2) == FROZEN_SEED
    uniforms = keyed_uniform(1234, 7, keyed_seed(3, 2), np.arange(4))
    np.testing.assert_array_equal(uniforms * 2**24, FROZEN_UNIFORMS)


def test_seed_range_order_and_length():
    keys = [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (2**64 - 2,), (2**80,)]
    seeds = [keyed_seed(*key) for key in keys[:-1]]
    assert len(set(seeds)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
    assert keyed_seed(-1) == keyed_seed(2**64 - 1)
    assert keyed_seed(np.int64(5), np.int32(6)) == keyed_seed(5, 6)


def test_no_collision_among_many_keys():
    seeds = {
        keyed_seed(1, Purpose.ROLLOUT, step, prompt, sample)
        for step in range(20)
        for prompt in range(500)
        for sample in range(8)
    }
    assert len(seeds) == 20 * 500 * 8


def test_position_is_the_key_not_the_order():
    positions = np.array([5, 3, 9, 3])
    uniforms = keyed_uniform(1, 2, 3, positions)
    assert uniforms.dtype == np.float32
    for at, position in enumerate(positions):
        assert uniforms[at] == keyed_uniform(1, 2, 3, int(position))
    assert keyed_uniform(1, 2, 3, positions.reshape(2, 2)).shape == (2, 2)
    assert keyed_uniform(1, 2, 3, []).shape == (0,)
    assert keyed_uniform(1, 2, 3, 5).shape == ()


@pytest.mark.filterwarnings("error")
def test_no_overflow_warning():
    keyed_uniform(2**63, 2**40, 2**63 - 1, 7)
    keyed_uniform(2**63, 2**40, 2**63 - 1, np.arange(3))


def test_every_part_of_the_key_matters():
    base = keyed_uniform(1, 2, 3, np.arange(64))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)):
        assert (keyed_uniform(*other, np.arange(64)) != base).mean() > 0.9


def test_uniform_and_uncorrelated():
    """[steps x trajectories, positions] numbers; bounds are six standard deviations."""
    table = np.stack(
        [keyed_uniform(7, s, t, np.arange(64)) for s in range(40) for t in range(40)]
    ).astype(np.float64)
    count = table.size
    assert table.min() >= 0.0 and table.max() < 1.0
    assert abs(table.mean() - 0.5) < 6 * (1 / 12 / count) ** 0.5
    histogram = np.histogram(table, bins=64, range=(0, 1))[0]
    chi_square = ((histogram - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 63 + 6 * (2 * 63) ** 0.5
    centred = table - 0.5
    for product in (centred[1:] * centred[:-1], centred[40:] * centred[:-40]):
        assert abs(product.mean()) < 6 / 12 / product.size**0.5
    neighbours = centred[:, 1:] * centred[:, :-1]
    assert abs(neighbours.mean()) < 6 / 12 / neighbours.size**0.5
