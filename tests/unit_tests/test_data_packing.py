"""Packing: what a row holds, that nothing is lost, and that the layout changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from loss_settings import config_of

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import count_loss_tokens, loss_weights, pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.losses.draws import keyed_seed, keyed_uniform
from megatron_tropd.mcore.layout import zigzag


def _trajectory(
    prompt: int, sample: int, sizes: tuple[int, int, int], seed: int = 0
) -> TokenSequence:
    rng = np.random.default_rng((seed, prompt, sample))
    prompt_ids, prefix_ids, response_ids = (
        tuple(rng.integers(3, 100, size).tolist()) for size in sizes
    )
    return TokenSequence.of_runs(
        SampleKey(4, prompt, sample),
        (Writer.CONTEXT, prompt_ids),
        (Writer.TEACHER, prefix_ids),
        (Writer.STUDENT, response_ids),
        logprobs=tuple((-rng.random(sizes[2])).tolist()),
        version=4,
    )


def _trajectories() -> list[TokenSequence]:
    rng = np.random.default_rng(7)
    sizes = [tuple(rng.integers((1, 0, 1), (6, 9, 12)).tolist()) for _ in range(24)]
    return [_trajectory(i // 4, i % 4, size) for i, size in enumerate(sizes)]


def _pack(trajectories: list[TokenSequence], **overrides) -> list[MicroBatch]:
    settings = {
        "dp_rank": 0,
        "dp_size": 1,
        "tokens_per_micro_batch": 64,
        "pad_multiple": 1,
        "seed": 3,
        "step": 4,
    }
    return pack(trajectories, **(settings | overrides))


def _tokens_of(batches: list[MicroBatch]) -> set[tuple]:
    """Every loss token as (row, position, label, segment, draw, log-prob, input token)."""
    out = set()
    for batch in batches:
        for b, s in batch.loss_mask.nonzero().tolist():
            out.add(
                (
                    batch.rows[b],
                    batch.response_positions[b, s].item(),
                    batch.labels[b, s].item(),
                    batch.writers[b, s].item(),
                    batch.uniforms[b, s].item(),
                    batch.behaviour_logprobs[b, s].item(),
                    batch.tokens[b, s].item(),
                )
            )
    return out


def test_a_row_by_hand():
    t = TokenSequence.of_runs(
        SampleKey(4, 5, 1),
        (Writer.CONTEXT, (10, 11, 12)),
        (Writer.TEACHER, (20, 21)),
        (Writer.STUDENT, (30, 31)),
        logprobs=(-0.5, -0.25),
    )
    (batch,) = _pack([t], pad_multiple=4)
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 30, 0, 0]]
    assert batch.labels.tolist() == [[11, 12, 20, 21, 30, 31, 0, 0]]
    assert batch.writers.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]]
    assert batch.loss_mask.tolist() == [[False] * 2 + [True] * 4 + [False] * 2]
    assert batch.position_ids.tolist() == [list(range(8))]
    assert batch.response_positions.tolist() == [[0, 0, 0, 1, 2, 3, 0, 0]]
    assert batch.behaviour_logprobs.tolist() == [[0, 0, 0, 0, -0.5, -0.25, 0, 0]]
    draws = keyed_uniform(3, 4, keyed_seed(5, 1), np.arange(4))
    assert batch.uniforms[0, 2:6].tolist() == draws.tolist()
    assert batch.rows == (0,)
    assert (batch.tokens.dtype, batch.uniforms.dtype) == (torch.int64, torch.float32)


def test_smallest_trajectory():
    (batch,) = _pack([_trajectory(0, 0, (1, 0, 1))])
    assert batch.tokens.shape == (1, 1)
    assert batch.writers.tolist() == [[Writer.STUDENT]]


def test_nothing_lost_and_budget_kept():
    trajectories = _trajectories()
    batches = _pack(trajectories)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(24))
    assert all(batch.tokens.numel() <= 64 for batch in batches)
    teacher, student, masked, _ = count_loss_tokens(trajectories)
    assert masked == 0
    found = torch.cat([batch.writers.flatten() for batch in batches])
    assert (found == Writer.TEACHER).sum() == teacher
    assert (found == Writer.STUDENT).sum() == student


def test_sorting_keeps_padding_small():
    trajectories = _trajectories()
    batches = _pack(trajectories, tokens_per_micro_batch=100)
    rows = sum(batch.tokens.numel() for batch in batches)
    assert rows < 1.3 * sum(len(t) for t in trajectories)
    lengths = [len(trajectories[row]) for batch in batches for row in batch.rows]
    assert lengths == sorted(lengths, reverse=True), "rows within a batch too"


@pytest.mark.parametrize(
    ("dp_size", "multiple"), [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (3, 2), (3, 4), (3, 8)]
)
@pytest.mark.parametrize("budget", [25, 64, 10_000])
def test_micro_batches_come_in_multiples(budget: int, multiple: int, dp_size: int):
    """As the virtual stages of so many stages want them; with nothing lost."""
    trajectories = _trajectories()
    parts = [
        _pack(
            trajectories,
            dp_rank=rank,
            dp_size=dp_size,
            tokens_per_micro_batch=budget,
            batch_multiple=multiple,
        )
        for rank in range(dp_size)
    ]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) % multiple == 0
    assert all(batch.rows for part in parts for batch in part)
    assert {token for part in parts for token in _tokens_of(part)} == _tokens_of(
        _pack(trajectories)
    )


def test_too_few_rows_for_a_multiple_of_micro_batches():
    with pytest.raises(ConfigError, match="multiple of 25"):
        _pack(_trajectories(), batch_multiple=25, tokens_per_micro_batch=25)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [25, 64, 10_000])
@pytest.mark.parametrize("pad_multiple", [1, 4])
def test_layout_changes_no_token(dp_size: int, budget: int, pad_multiple: int):
    trajectories = _trajectories()
    budget = -(-budget // 4) * 4
    parts = [
        _pack(
            trajectories,
            dp_rank=rank,
            dp_size=dp_size,
            tokens_per_micro_batch=budget,
            pad_multiple=pad_multiple,
        )
        for rank in range(dp_size)
    ]
    assert {token for part in parts for token in _tokens_of(part)} == _tokens_of(
        _pack(trajectories)
    )
    assert {len(part) for part in parts} == {len(parts[0])}, "collectives meet"
    assert sum(len(batch.rows) for part in parts for batch in part) == len(trajectories)
    shapes = [batch.tokens.shape for part in parts for batch in part]
    assert all(shape[1] % pad_multiple == 0 and shape.numel() <= budget for shape in shapes)


@pytest.mark.parametrize(("multiple", "rounded_to"), [(1, 16), (4, 16), (6, 16)])
def test_rows_are_rounded_up_unless_one_would_not_fit(multiple, rounded_to):
    trajectories = _trajectories()
    longest = max(len(t) for t in trajectories) - 1
    least = -(-longest // multiple) * multiple
    assert 16 < least < 32
    for budget in (least, 200):
        settings = dict(pad_multiple=multiple, tokens_per_micro_batch=budget)
        batches = _pack(trajectories, **settings, rounded_to=rounded_to)
        assert {token for batch in batches for token in _tokens_of([batch])} == _tokens_of(
            _pack(trajectories)
        )
        lengths = {batch.tokens.shape[1] for batch in batches}
        assert all(length % multiple == 0 for length in lengths)
        rounded = {length for length in lengths if length % math.lcm(multiple, rounded_to) == 0}
        assert rounded == (lengths if budget == 200 else lengths - {least})
        assert all(batch.tokens.numel() <= budget for batch in batches)


@pytest.mark.parametrize("loss", [config_of(), config_of(mask_first_ids=(1, 2, 3))], ids=str)
def test_places_are_those_of_the_masks(loss):
    trajectories, labels = _trajectories(), 0
    for batch in _pack(trajectories, loss=loss, pad_multiple=4):
        mask = batch.loss_mask
        assert torch.equal(batch.loss_at, mask.flatten().nonzero()[:, 0])
        assert torch.equal(batch.of_loss_tokens(batch.labels), batch.labels[mask])
        assert torch.equal(batch.loss_rows, torch.tensor(batch.rows)[mask.nonzero()[:, 0]])
        student = batch.writers[mask] == Writer.STUDENT
        assert torch.equal(batch.student_at, student.nonzero()[:, 0])
        labels += len(batch.loss_at)
    counts = count_loss_tokens(trajectories, loss)
    assert labels == counts.teacher + counts.student > 0


def test_order_of_the_list_changes_no_draw():
    trajectories = _trajectories()
    draws = {}
    for order in (trajectories, trajectories[::-1]):
        for batch in _pack(order):
            for b, row in enumerate(batch.rows):
                key = order[row].key
                assert key == batch.keys[b]
                value = batch.uniforms[b][batch.loss_mask[b]].tolist()
                assert draws.setdefault(key, value) == value
    assert len(draws) == 24


def test_draws_differ_by_step_seed_and_trajectory():
    pair = [_trajectory(0, 0, (2, 0, 9)), _trajectory(0, 1, (2, 0, 9))]
    draws = [
        tuple(row.tolist())
        for settings in ({}, {"seed": 4}, {"step": 5})
        for batch in _pack(pair, **settings)
        for row in batch.uniforms
    ]
    assert len(draws) == len(set(draws)) == 6


def test_gradient_does_not_depend_on_the_packing():
    """A sum over tokens of a weight per (token, label, draw), as any of our losses is."""
    trajectories = _trajectories()
    grads = []
    for budget, dp_size in ((24, 1), (64, 2), (10_000, 1)):
        table = torch.linspace(-1, 1, 100, dtype=torch.float64, requires_grad=True)
        for rank in range(dp_size):
            for batch in _pack(
                trajectories, dp_rank=rank, dp_size=dp_size, tokens_per_micro_batch=budget
            ):
                mask = batch.loss_mask
                weight = batch.uniforms[mask].double() * batch.writers[mask]
                (weight * table[batch.tokens[mask]] * table[batch.labels[mask]]).sum().backward()
        grads.append(table.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-12, atol=1e-12)


def test_uneven_replicas_and_small_budget_are_refused():
    trajectories = _trajectories()
    with pytest.raises(ConfigError, match="24 trajectories cannot be dealt evenly to 5"):
        _pack(trajectories, dp_size=5)
    with pytest.raises(ConfigError, match="tokens_per_micro_batch = 4 is less than"):
        _pack(trajectories, tokens_per_micro_batch=4)


def test_empty_step():
    assert _pack([]) == []
    assert count_loss_tokens([]) == (0, 0, 0, 0)


FIRST_IDS = config_of(mask_first_ids=(20, 31, 99))


def _by_hand(finish: str = "stop") -> TokenSequence:
    return TokenSequence.of_runs(
        SampleKey(4, 5, 1),
        (Writer.CONTEXT, (10, 20, 31)),
        (Writer.TEACHER, (20, 21)),
        (Writer.STUDENT, (30, 31, 20, 31)),
        logprobs=(-0.5, -0.25, -0.1, -0.2),
        finish=finish,
    )


def test_the_first_occurrence_of_an_id_in_a_response_is_masked_whoever_wrote_it():
    masked = loss_weights(_by_hand(), FIRST_IDS)[3:] == 0
    # The prompt's 20 and 31 are none of the response's; 99 does not occur.
    assert masked.tolist() == [True, False, False, True, False, False]
    (batch,) = _pack([_by_hand()], loss=FIRST_IDS, pad_multiple=10)
    assert batch.writers.tolist() == [[0, 0, 1, 1, 2, 2, 2, 2, 0, 0]]
    assert batch.weights.tolist() == [[0, 0, *(~masked).tolist(), 0, 0]]
    assert batch.labels[batch.loss_mask].tolist() == [21, 30, 20, 31]
    assert count_loss_tokens([_by_hand()], FIRST_IDS) == (1, 3, 2, 0)


def test_a_response_that_was_cut_off_is_masked_with_its_prefix():
    loss = config_of(mask_truncated=True)
    pair = [_by_hand("length"), _by_hand("stop")]
    (batch,) = _pack(pair, loss=loss)
    assert batch.loss_mask.sum(dim=1).tolist() == [0, 6]
    assert count_loss_tokens(pair, loss) == (2, 4, 6, 0)
    assert count_loss_tokens(pair) == (4, 8, 0, 0)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_counts_agree_with_the_masks_of_all_ranks(dp_size: int):
    loss = config_of(mask_first_ids=tuple(range(3, 20)), mask_truncated=True)
    trajectories = [
        t.replace(finish="length" if i % 5 == 0 else "stop") for i, t in enumerate(_trajectories())
    ]
    found = torch.zeros(3, dtype=torch.int64)
    for rank in range(dp_size):
        for batch in _pack(trajectories, dp_rank=rank, dp_size=dp_size, loss=loss):
            masked = (batch.weights == 0) & (batch.writers != Writer.CONTEXT)
            kept = batch.writers[batch.loss_mask]
            sums = [(kept == Writer.TEACHER).sum(), (kept == Writer.STUDENT).sum()]
            found += torch.stack([*sums, masked.sum()])
    assert (*found.tolist(), 0) == count_loss_tokens(trajectories, loss)
    assert found.min() > 0


def test_any_order_of_writers_is_packed_and_weighed():
    """Two turns: a tool's text between them has no loss, but places and draws go on."""
    t = TokenSequence.of_runs(
        SampleKey(4, 5, 1),
        (Writer.CONTEXT, (10, 20)),
        (Writer.STUDENT, (30, 31)),
        (Writer.CONTEXT, (20, 41)),
        (Writer.TEACHER, (50,)),
        (Writer.STUDENT, (20, 2)),
        logprobs=(-0.5, -0.25, -0.125, -1),
    )
    t = t.replace(
        weight_N=t.weight_N * np.float32([1, 1, 0.5, 1, 1, 1, 2, 1, 1]),
        engine_logprobs_N=t.engine_logprobs_N * 2,
    )
    (batch,) = _pack([t], loss=config_of(mask_first_ids=(20,)), pad_multiple=9)
    assert batch.writers.tolist() == [[0, 2, 2, 0, 0, 1, 2, 2, 0]]
    # The first 20 that somebody wrote, not the prompt's or the tool's.
    assert batch.weights.tolist() == [[0, 0.5, 1, 0, 0, 2, 0, 1, 0]]
    assert batch.behaviour_logprobs.tolist() == [[0, -0.5, -0.25, 0, 0, 0, -0.125, -1, 0]]
    assert batch.engine_logprobs.tolist() == [[0, -1, -0.5, 0, 0, 0, -0.25, -2, 0]]
    assert batch.response_positions.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 0]]
    draws = keyed_uniform(3, 4, keyed_seed(5, 1), np.arange(7))
    assert batch.uniforms[0, 1:8].tolist() == draws.tolist()
    assert batch.loss_at.tolist() == [1, 2, 5, 7] and batch.student_at.tolist() == [0, 1, 3]
    assert count_loss_tokens([t], config_of(mask_first_ids=(20,))) == (1, 3, 1, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_of_rows_together_hold_every_token_as_it_was(ranks: int):
    trajectories = _trajectories()
    whole = _pack(trajectories, pad_multiple=2 * ranks, tokens_per_micro_batch=72)
    assert max(len(batch.rows) for batch in whole) > 1
    shares = [
        [batch.at(zigzag(batch.tokens.shape[1], rank, ranks)) for batch in whole]
        for rank in range(ranks)
    ]
    of_ranks = [_tokens_of(share) for share in shares]
    assert set().union(*of_ranks) == _tokens_of(whole)
    assert sum(map(len, of_ranks)) == len(_tokens_of(whole))
    for share in shares:
        for part, batch in zip(share, whole, strict=True):
            assert part.tokens.shape == (len(batch.rows), batch.tokens.shape[1] // ranks)
            assert (part.position_ids[:, 1:] > part.position_ids[:, :-1]).all()
            assert part.loss_at.tolist() == part.loss_mask.flatten().nonzero().flatten().tolist()
            rows = torch.tensor(batch.rows)[part.loss_at // part.tokens.shape[1]]
            assert torch.equal(part.loss_rows, rows)
            written = part.of_loss_tokens(part.writers) == Writer.STUDENT
            assert torch.equal(part.student_at, written.nonzero().flatten())


def test_a_rank_has_a_chunk_and_its_mirror_image_as_megatron_deals_them():
    assert [zigzag(8, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    (batch,) = _pack([_trajectory(0, 0, (2, 0, 7))], pad_multiple=8)
    mask = torch.arange(64).view(1, 1, 8, 8)
    part = dataclasses.replace(batch, attention_mask=mask).at(zigzag(8, 1, 2))
    assert part.labels.tolist() == batch.labels[:, 2:6].tolist(), "of the whole row, not shifted"
    assert torch.equal(part.attention_mask, mask[:, :, 2:6])
