"""Metrics of a step: sums that do not depend on the split, and the right denominators."""

import math
import random
import time

import pytest
import torch
import torch.distributed as dist
from loss_settings import config_of

from megatron_tropd.config import LossSettings
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts, pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.examples import example_rows, gather_examples
from megatron_tropd.distill.metrics import (
    POSITION_BUCKETS,
    STUDENT_MEANS,
    StepSums,
    repetition,
    sequence_metrics,
)
from megatron_tropd.distill.step_loss import segment_weights
from megatron_tropd.losses.trouble import words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    """A world of one, so that ``reduce`` has a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trajectory(
    index: int, prefix: int, response: int, prompt: tuple[int, ...] = (5, 6, 7), **changes
) -> TokenSequence:
    return TokenSequence.of_runs(
        SampleKey(3, index, 0),
        (Writer.CONTEXT, prompt),
        (Writer.TEACHER, range(10, 10 + prefix)),
        (Writer.STUDENT, range(20, 20 + response)),
        logprobs=(-0.5,) * response,
        **({"version": 3} | changes),
    )


def batches(
    trajectories: list[TokenSequence], tokens: int, loss: LossSettings | None = None
) -> list[MicroBatch]:
    return pack(
        trajectories,
        dp_rank=0,
        dp_size=1,
        tokens_per_micro_batch=tokens,
        seed=1,
        step=3,
        loss=loss or config_of(),
    )


def values_of(batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Numbers that name their token: the label, so that sums can be checked by hand."""
    labels_T = batch.labels[batch.loss_mask].float()
    names = {*STUDENT_MEANS.values(), "student_logprob", "teacher_logprob", "term"}
    values = {name: labels_T / 100 for name in names}
    values["student_logprob"] = torch.full_like(labels_T, -0.5)
    return labels_T, values


def test_means_are_over_student_tokens_and_the_loss_over_all():
    trajectories = [trajectory(0, prefix=2, response=3), trajectory(1, prefix=0, response=2)]
    sums = StepSums.zeros(CPU)
    for batch in batches(trajectories, 1000):
        loss_T, values = values_of(batch)
        sums.add(loss_T, values, batch)
    metrics = sums.reduce().metrics()
    student = [20, 21, 22, 20, 21]
    assert metrics["tokens_student"] == 5 and metrics["tokens_teacher"] == 2
    assert metrics["loss"] == pytest.approx((sum(student) + 10 + 11) / 7)
    for name in STUDENT_MEANS:
        assert metrics[name] == pytest.approx(sum(student) / 5 / 100), name
    assert metrics["engine_gap_mean"] == metrics["engine_gap_max"] == 0
    assert metrics["engine_ratio_mean"] == 1


def test_masked_tokens_are_in_no_number():
    loss = config_of(mask_first_ids=(10, 21), mask_truncated=True)
    trajectories = [
        trajectory(0, prefix=2, response=3),
        trajectory(1, prefix=1, response=40, finish="length"),
    ]
    sums = StepSums.zeros(CPU)
    for batch in batches(trajectories, 1000, loss):
        loss_T, values = values_of(batch)
        sums.add(loss_T, values, batch)
    metrics = sums.reduce().metrics()
    assert metrics["tokens_student"] == 2 and metrics["tokens_teacher"] == 1
    assert metrics["loss"] == pytest.approx((20 + 22 + 11) / 3)
    assert metrics["k1"] == pytest.approx((20 + 22) / 2 / 100)


def test_a_step_without_loss_tokens_gives_nulls_and_no_error():
    sums = StepSums.zeros(CPU)
    for batch in batches(
        [trajectory(0, prefix=2, response=3, finish="length")],
        1000,
        config_of(mask_truncated=True),
    ):
        loss_T, values = values_of(batch)
        assert len(loss_T) == 0
        sums.add(loss_T, values, batch)
    metrics = sums.reduce().metrics()
    assert metrics["loss"] is None and metrics["k1"] is None and metrics["tokens_student"] == 0


def test_the_split_into_micro_batches_changes_nothing():
    trajectories = [trajectory(i, prefix=i % 3, response=2 + i) for i in range(7)]
    results = []
    for tokens in (16, 40, 1000):
        sums = StepSums.zeros(CPU)
        for batch in batches(trajectories, tokens):
            loss_T, values = values_of(batch)
            sums.add(loss_T, values, batch)
        results.append(sums.reduce().metrics())
    positions = [result.pop("acceptance_by_position") for result in results]
    for other, by_position in zip(results[1:], positions[1:], strict=True):
        assert other == pytest.approx(results[0])
        assert by_position == pytest.approx(positions[0])


def test_the_gap_to_the_engine_is_measured_on_student_tokens_only():
    (batch,) = batches([trajectory(0, prefix=2, response=2)], 1000)
    loss_T, values = values_of(batch)
    teacher_T = batch.writers[batch.loss_mask] == Writer.TEACHER
    # On both sides of the engine's -0.5: the gaps do not cancel out.
    values["student_logprob"] = torch.where(loss_T == 20, -0.25, torch.tensor(-0.75))
    values["student_logprob"][teacher_T] = -9.0
    sums = StepSums.zeros(CPU)
    sums.add(loss_T, values, batch)
    metrics = sums.reduce().metrics()
    assert metrics["engine_gap_mean"] == metrics["engine_gap_max"] == 0.25
    assert metrics["engine_ratio_mean"] == pytest.approx(math.cosh(0.25))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(loss=math.nan), "both models' log-probs of it are numbers"),
        (dict(loss=math.inf), "one model excludes"),
        (dict(loss=math.nan, student_logprob=math.nan), "the student's log-prob of it is nan"),
        (dict(student_logprob=math.nan), "the student's log-prob of it is nan"),  # weight 0
        (dict(loss=math.nan, teacher_logprob=math.nan), "the teacher's log-prob of it is nan"),
        (dict(student_logprob=math.nan, teacher_logprob=math.nan), "outside the vocabulary"),
    ],
    ids=str,
)
def test_the_first_token_with_a_loss_that_is_not_finite_is_found(changes, says):
    """By trajectory, then by place in it, however the rows lie in micro-batches."""
    trajectories = [trajectory(i, prefix=1, response=2 + i) for i in range(4)]
    for tokens in (16, 1000):
        sums = StepSums.zeros(CPU)
        for batch in batches(trajectories, tokens):
            loss_T, values = values_of(batch)
            b_T, s_T = batch.loss_mask.nonzero().unbind(1)
            rows_T = torch.tensor(batch.rows)[b_T]
            places_T = batch.response_positions[b_T, s_T]
            bad_T = ((rows_T == 2) & (places_T >= 3)) | ((rows_T == 3) & (places_T == 0))
            values["loss"] = loss_T
            for name, value in changes.items():
                values[name] = values[name].masked_fill(bad_T, value)
            sums.add(values["loss"], values, batch)
        found = sums.reduce().first_bad_token
        assert (found.row, found.position) == (2, 3)
        assert says in words(found.finding)
    assert StepSums.zeros(CPU).reduce().first_bad_token is None


def test_nobody_waits_for_the_search(monkeypatch):
    """In a step without trouble a micro-batch asks the device for nothing but its masks."""
    (batch,) = batches([trajectory(0, prefix=0, response=9)], 1000)
    loss_T, values = values_of(batch)

    def asked(*_):
        raise AssertionError("the host waits for the device")

    sums = StepSums.zeros(CPU)
    for name in ("__bool__", "item", "tolist", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    sums.add(loss_T, values, batch)
    monkeypatch.undo()
    assert sums.reduce().first_bad_token is None


def test_values_a_signal_does_not_give_are_null():
    (batch,) = batches([trajectory(0, prefix=0, response=2)], 1000)
    loss_T, values = values_of(batch)
    del values["tv"]
    sums = StepSums.zeros(CPU)
    sums.add(loss_T, values, batch)
    metrics = sums.reduce().metrics()
    assert metrics["tv"] is None and metrics["reverse_kl"] is not None


def test_nothing_counted_is_null_and_not_an_error():
    metrics = StepSums.zeros(CPU).reduce().metrics()
    assert metrics["loss"] is None and metrics["tokens_student"] == 0
    assert metrics["acceptance_by_position"] == []


def test_position_buckets_double():
    (batch,) = batches([trajectory(0, prefix=0, response=65)], 1000)
    loss_T, values = values_of(batch)
    for first in (8, 16, 32, 64):
        values["trust"] = (batch.response_positions[batch.loss_mask] >= first).float()
        sums = StepSums.zeros(CPU)
        sums.add(loss_T, values, batch)
        below = first.bit_length() - 3
        expected = [0.0] * below + [1.0] * (5 - below)
        assert sums.reduce().metrics()["acceptance_by_position"] == expected
    assert 2**20 >> (POSITION_BUCKETS + 2) == 1, "the last bucket ends at 2**20"


def test_what_the_token_ids_alone_tell():
    trajectories = [
        trajectory(0, prefix=4, response=4, version=2),
        trajectory(1, prefix=0, response=8, finish="length"),
    ]
    metrics = sequence_metrics(trajectories, step=3)
    assert metrics["response_length"] == 8
    assert metrics["truncated_share"] == 0.5
    assert metrics["prefix_share"] == 0.25 and metrics["prefix_longest"] == 4
    assert metrics["staleness"] == 0.5


def counted_repetition(ids: list[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@pytest.mark.parametrize("n", [1, 2, 4, 7, 40])
def test_repetition_is_what_counting_says(n):
    draw = random.Random(n)
    for size, largest in (
        (0, 1),
        (3, 5),
        (50, 1),
        (300, 2),
        (400, 9),
        (2000, 151_935),
        (90, 2**40),
    ):
        ids = [draw.randint(0, largest) for _ in range(size)] + [0, largest] * (size // 10)
        assert repetition(ids, n) == counted_repetition(ids, n)


def test_repetition_is_not_counted_in_python():
    """Counting tuples took 6 s a step of 512 x 8,096 tokens."""
    draw = random.Random(0)
    ids = [draw.randrange(151_936) for _ in range(8096)]
    seconds = {}
    for count in (repetition, counted_repetition) * 3:
        began = time.process_time()
        count(ids, 4)
        seconds[count] = min(time.process_time() - began, seconds.get(count, math.inf))
    assert seconds[repetition] < seconds[counted_repetition] / 2


@pytest.mark.parametrize(
    ("ids", "share"),
    [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1] * 8, 0.8), ([1, 2, 3, 4] * 2, 0.2)],
)
def test_repetition_is_the_share_of_four_grams_seen_before(ids, share):
    assert repetition(ids) == pytest.approx(share)


def test_segment_weights_turn_the_joint_denominator_into_the_separate_one():
    counts, separate = (
        LossCounts(teacher=3, student=9, masked=5),
        config_of(denominator="separate"),
    )
    assert segment_weights(config_of(), counts) == (1.0, 1.0, 1.0)
    # Megatron divides by 12: a sum over 3 teacher tokens times 4 / 12 is their mean.
    assert segment_weights(separate, counts) == (4.0, 12 / 9, 1.0)
    assert segment_weights(separate, LossCounts(0, 9, 0)) == (1.0, 1.0, 1.0)
    assert segment_weights(separate, LossCounts(0, 0, 4)) == (1.0, 1.0, 1.0)


def test_a_selection_is_divided_by_the_tokens_it_keeps():
    settings = {"region": "none", "select": "student_entropy", "select_share": 0.25}
    counts = LossCounts(teacher=2, student=10, masked=0)
    # 3 of the 10 student tokens are trained, with 2 teacher tokens: 12 / 5 undoes N = 12.
    assert segment_weights(config_of(**settings), counts) == (12 / 5, 12 / 5, 1.0)
    separate = config_of(denominator="separate", **settings)
    assert segment_weights(separate, counts) == (12 / 2, 12 / 3, 1.0)
    assert segment_weights(config_of(**settings), LossCounts(0, 0, 7)) == (1.0, 1.0, 1.0)


def test_golden_answers_have_a_mean_of_their_own_whatever_the_denominator():
    counts = LossCounts(teacher=3, student=9, masked=0, golden=4)
    # Megatron divides by 16.
    assert segment_weights(config_of(), counts) == (16 / 12, 16 / 12, 4.0)
    assert segment_weights(config_of(denominator="separate"), counts) == (16 / 3, 16 / 9, 4.0)
    assert segment_weights(config_of(), LossCounts(0, 0, 5, golden=4))[2] == 1.0


def test_examples_are_gathered_by_row_and_token(monkeypatch):
    def gather(mine, parts, dst):
        parts[:] = [mine, {0: {"tv": {3: 0.25}}}]

    monkeypatch.setattr(dist, "gather_object", gather)
    assert gather_examples({5: {"tv": {2: 0.5}}, 0: {"tv": {0: 0.75}}}) == {
        0: {"tv": {0: 0.75, 3: 0.25}},
        5: {"tv": {2: 0.5}},
    }


def test_examples_are_spread_over_prompts_and_samples():
    assert example_rows(64, 4, 6) == [0, 5, 10, 15, 16, 21]
    assert example_rows(8, 4, 6) == [0, 5]
