"""Teacher prefixes: the schedule, the lengths, and which samples carry one."""

import math

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.data.prefixes import alpha, plan_requests, prefix_length
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.types import Prompt


def _response(length: int, reason: str = "stop", prompt: int = 0, sample: int = 0):
    return TeacherResponse(prompt, sample, tuple(range(10, 10 + length)), reason)


def _prompts(count: int = 3) -> list[Prompt]:
    return [Prompt(i, f"p{i}", (1, 2, 3 + i), {}) for i in range(count)]


def _plan(step: int = 0, responses=None, prompts=None, seed: int = 1, **guidance):
    return plan_requests(
        prompts or _prompts(),
        responses,
        step=step,
        steps=10,
        rollout=RolloutConfig(prompts="x", max_new_tokens=16, samples_per_prompt=4),
        guidance=GuidanceConfig(**guidance),
        seed=seed,
    )


def test_alpha_is_a_half_cosine():
    assert alpha(0, 200) == 1.0
    assert alpha(100, 200) == pytest.approx(0.5)
    assert alpha(200, 200) == 0.0
    assert alpha(50, 200) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    values = [alpha(step, 200) for step in range(201)]
    assert values == sorted(values, reverse=True)


def test_a_constant_schedule_keeps_the_whole_response():
    assert {alpha(step, 200, "constant") for step in (0, 100, 200)} == {1.0}
    responses = {i: (_response(9, prompt=i),) for i in range(3)}
    for step in (0, 9):
        plans = _plan(step, responses, schedule="constant", prefixed_per_prompt=2)
        lengths = [len(plan.prefix_ids) for plan in plans]
        assert lengths == [8, 8, 0, 0] * 3, "all but the stop token"


@pytest.mark.parametrize(
    ("length", "reason", "step", "room", "expected"),
    [
        (12, "stop", 0, 100, 11),  # never the stop token
        (12, "length", 0, 100, 12),
        (12, "stop", 5, 100, 6),
        (13, "stop", 5, 100, 6),  # floor
        (12, "length", 10, 100, 0),
        (12, "length", 0, 8, 7),  # one token left to write
        (12, "length", 0, 1, 0),
        (1, "stop", 0, 100, 0),  # a response that is only the stop token
    ],
)
def test_prefix_length(length: int, reason: str, step: int, room: int, expected: int):
    found = prefix_length(_response(length, reason), step=step, steps=10, max_new_tokens=room)
    assert found == expected


def test_uniform_prefix_length_covers_its_range_evenly():
    lengths = [
        prefix_length(
            _response(12), step=5, steps=10, max_new_tokens=99, rule="uniform", draw=i / 700
        )
        for i in range(700)
    ]
    assert {n: lengths.count(n) for n in range(7)} == dict.fromkeys(range(7), 100)


def test_plan_without_guidance():
    plans = _plan()
    assert [(p.prompt.index, p.sample_index) for p in plans] == [
        (i, j) for i in range(3) for j in range(4)
    ]
    assert all(p.prefix_ids == () and p.request.max_new_tokens == 16 for p in plans)
    assert all(p.request.token_ids == p.prompt.token_ids for p in plans)
    assert len({p.request.seed for p in plans}) == 12
    assert not {p.request.seed for p in plans} & {p.request.seed for p in _plan(step=1)}
    assert not {p.request.seed for p in plans} & {p.request.seed for p in _plan(seed=2)}


def test_seeds_and_prefixes_do_not_depend_on_the_other_prompts():
    responses = {i: (_response(9, prompt=i),) for i in range(3)}
    whole = _plan(5, responses, prefix_length="uniform")
    alone = _plan(5, responses, prompts=_prompts()[1:2], prefix_length="uniform")
    assert alone == whole[4:8]


@pytest.mark.parametrize("per_prompt", [0, 1, 3])
def test_only_the_first_samples_carry_a_prefix(per_prompt: int):
    responses = {i: (_response(9, prompt=i),) for i in range(3)}
    for plan in _plan(5, responses, prefixed_per_prompt=per_prompt):
        expected = (10, 11, 12, 13) if plan.sample_index < per_prompt else ()
        assert plan.prefix_ids == expected
        assert plan.request.token_ids == plan.prompt.token_ids + expected
        assert plan.request.max_new_tokens == 16 - len(expected)


def test_several_responses_are_all_used():
    options = tuple(TeacherResponse(0, s, (100 + s,) * 9, "stop") for s in range(3))
    used = {
        _plan(0, {0: options}, prompts=_prompts(1), seed=seed)[0].prefix_ids[0]
        for seed in range(20)
    }
    assert used == {100, 101, 102}


def test_responses_that_grow_are_planned_with_the_room_of_their_step():
    rollout = RolloutConfig(
        prompts="x", max_new_tokens=16, samples_per_prompt=2, first_new_tokens=5, growth_steps=4
    )
    expected = [5, 7, 10, 13, 16, 16]
    assert [rollout.new_tokens_at(step) for step in range(6)] == expected
    responses = {i: (_response(12, prompt=i),) for i in range(3)}
    for step, room in enumerate(expected):
        plans = plan_requests(
            _prompts(),
            responses,
            step=step,
            steps=10,
            rollout=rollout,
            guidance=GuidanceConfig(schedule="constant"),
            seed=1,
        )
        for plan in plans:
            assert plan.request.max_new_tokens + len(plan.prefix_ids) == room
            assert plan.request.max_new_tokens >= 1
    assert RolloutConfig(prompts="x", max_new_tokens=16).new_tokens_at(3) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(first_new_tokens=17, growth_steps=2), "at most rollout.max_new_tokens = 16, found"),
        (dict(first_new_tokens=4), "Set both or neither"),
        (dict(growth_steps=4), "Set both or neither"),
    ],
)
def test_a_growth_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RolloutConfig(prompts="x", max_new_tokens=16, **settings)
