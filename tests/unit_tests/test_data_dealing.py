"""Which rows go together and to whom: nothing lost, budgets kept, loads even."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data.dealing import BatchRows, Dealing, deal
from megatron_tropd.planning.parameters import PlannedModel
from megatron_tropd.planning.seconds import layer_flops

DENSE = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
}
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "head_dim": 64,
    "moe_intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
}
WINDOWED = {
    "model_type": "mistral",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
    "sliding_window": 256,
}


def _square(length: int) -> float:
    return length * (1 + length / 50)


def _deal(lengths: list[int], dp_size: int, budget: int, **how) -> Dealing:
    return deal(lengths, lengths, dp_size=dp_size, tokens_per_micro_batch=budget, **how)


def _lengths(count: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(3, 0.9, count)
    return np.clip(drawn, 1, 200).astype(int).tolist()


def _loads(dealing: Dealing, work: Callable[[int], float]) -> list[float]:
    return [sum(len(b.rows) * work(b.length) for b in mine) for mine in dealing.replicas]


def test_one_replica_fills_its_budget_from_the_longest_on():
    dealing = _deal([3, 9, 5, 9, 2, 5], 1, 20)
    assert dealing.replicas == ((BatchRows((1, 3), 9), BatchRows((2, 5, 0, 4), 5)),)
    assert dealing.positions == 33 and dealing.padding_share == pytest.approx(1 - 33 / 38)


def test_two_replicas_by_hand():
    """Of [9 9] [5 5 3 2] the first has 18, the second 20; both cuts are as light as they can be."""
    dealing = _deal([3, 9, 5, 9, 2, 5], 2, 20)
    assert dealing.replicas == ((BatchRows((2, 5, 0, 4), 5),), (BatchRows((1, 3), 9),))
    assert dealing.waiting_share(float) == pytest.approx(1 - 19 / 20)
    # If attention counts, long rows are worth more.
    assert dealing.waiting_share(_square) == pytest.approx(1 - (22 + 21.24) / 2 / 22)


def test_a_replica_with_one_long_row_gets_little_else():
    dealing = _deal([64, *[8] * 24], 2, 64, work=_square)
    long, short = dealing.replicas
    assert [len(batch.rows) for batch in long] == [1, 8]
    assert [len(batch.rows) for batch in short] == [8, 8]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [200, 777])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_row_once_within_the_budget_and_equally_many_batches(dp_size, budget, multiple):
    lengths = _lengths(96)
    dealing = _deal(lengths, dp_size, budget, batch_multiple=multiple, work=_square)
    batches = [batch for mine in dealing.replicas for batch in mine]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(96))
    assert all(len(b.rows) * b.length <= budget for b in batches)
    assert all(b.length == max(lengths[row] for row in b.rows) for b in batches)
    (count,) = {len(mine) for mine in dealing.replicas}
    assert count % multiple == 0
    least = -(-sum(lengths) // budget)
    assert dp_size * count < 1.5 * least + dp_size * multiple
    for mine in dealing.replicas:
        loads = [b.length if dp_size == 1 else len(b.rows) * _square(b.length) for b in mine]
        assert loads == sorted(loads, reverse=True)
    again = _deal(lengths, dp_size, budget, batch_multiple=multiple, work=_square)
    assert again == dealing


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parts", [2, 4])
def test_the_heaviest_batch_is_as_light_as_any_cut_makes_it(seed, parts):
    lengths = sorted(_lengths(10, seed), reverse=True)
    budget = 3 * lengths[0]
    fewest = len(_deal(lengths, 1, budget).replicas[0])
    count = -(-fewest // parts) * parts

    def heaviest(edges: tuple[int, ...]) -> float:
        cuts = list(itertools.pairwise((0, *edges, len(lengths))))
        if any((b - a) * lengths[a] > budget for a, b in cuts):
            return float("inf")
        return max((b - a) * _square(lengths[a]) for a, b in cuts)

    best = min(map(heaviest, itertools.combinations(range(1, len(lengths)), count - 1)))
    dealing = _deal(lengths, parts, budget, work=_square)
    found = max(len(b.rows) * _square(b.length) for mine in dealing.replicas for b in mine)
    assert found == pytest.approx(best, rel=1e-6)


def _load_in_turns(lengths: list[int], dp_size: int, budget: int) -> float:
    """Of each replica, if sorted rows are dealt in turn: all pad to the longest of a round."""
    lengths, load, start = sorted(lengths, reverse=True), 0.0, 0
    while start < len(lengths):
        longest = lengths[start]
        stop = min(start + dp_size * (budget // longest), len(lengths))
        load += (stop - start) / dp_size * _square(longest)
        start = stop
    return load


@pytest.mark.parametrize("seed", range(3))
def test_work_is_even_and_padding_small(seed):
    lengths = _lengths(512, seed)
    dealing = _deal(lengths, 8, 800, work=_square)
    assert dealing.waiting_share(_square) < 0.05
    assert max(_loads(dealing, _square)) < 0.9 * _load_in_turns(lengths, 8, 800)
    assert max(_loads(dealing, _square)) <= max(_loads(_deal(lengths, 8, 800), _square))


def test_too_few_rows_for_the_pipeline_are_refused():
    with pytest.raises(ConfigError, match="6 trajectories cannot make a multiple of 8"):
        _deal([5] * 6, 2, 50, batch_multiple=4)


def test_nothing_to_deal():
    assert _deal([], 2, 50).replicas == ((), ())
    assert _deal([], 2, 50).padding_share == _deal([], 2, 50).waiting_share(float) == 0


@pytest.mark.parametrize("config", [DENSE, MIXTURE, WINDOWED], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("length", [100, 4096])
def test_work_of_a_row_is_the_planners(config, length):
    shape = model_shape(config)
    layers = shape.layers * layer_flops(PlannedModel("student", config, shape), length, length)
    logits = 2 * length * shape.hidden * shape.vocab
    assert row_flops(shape, length) == pytest.approx(layers + logits, rel=1e-3)


def test_attention_grows_with_the_square():
    shape = model_shape(DENSE)
    assert row_flops(shape, 8192) > 2.1 * row_flops(shape, 4096)
    windowed = model_shape(WINDOWED)
    assert row_flops(windowed, 8192) == pytest.approx(2 * row_flops(windowed, 4096))
