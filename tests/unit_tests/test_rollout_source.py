"""Episodes of a step, side by side: what the engines are asked and what comes out."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from own_rollout import TOOL

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.data.prefixes import plan_requests
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import Writer
from megatron_tropd.data.sequence_files import dump_sequences
from megatron_tropd.data.types import Prompt
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.episodes import EpisodePlan, load_mode
from megatron_tropd.rollout.source import PENDING_FILE, RolloutSource, SampledRollouts
from megatron_tropd.rollout.weights.interface import NamedTensor

PROMPTS = [Prompt(i, f"p{i}", (1, 2, 3 + i), {}) for i in range(5)]
RESPONSES = {i: (TeacherResponse(i, 0, (20, 21, 22, 23), "stop"),) for i in range(5)}
STOPS = (2,)


class Engines:
    """Answers with the length of what it continues and the parity of its seed."""

    receivers = (0,)

    def __init__(self) -> None:
        self.channel = self
        self.version = 4
        self.ready = False
        self.calls: list[str] = []
        self.requests: list[list[SampleRequest]] = []
        self.sampling: list[Sampling] = []

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        self.version = version

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.calls.append("awake")
        try:
            yield
        finally:
            self.calls.append("asleep")

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        self.calls.append(f"generate {len(requests)}")
        self.requests.append(list(requests))
        return self._answers()

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        self.calls.append(f"start {len(requests)}")
        self.requests.append(list(requests))
        self.sampling.append(sampling)

    def finish(self) -> list[Sample]:
        self.calls.append("finish")
        return self._answers()

    def arrived(self) -> list[Sample] | None:
        return self._answers() if self.ready else None

    def _answers(self) -> list[Sample]:
        return [
            Sample((30 + request.seed % 2, len(request.token_ids)), (-0.5, -1.5), "stop")
            for request in self.requests[-1]
        ]

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make(engines: SamplingEngines, mode: str = "single_turn") -> RolloutSource:
    """Three prompts with two samples each; the first one carries a prefix."""
    rollout = RolloutConfig(
        prompts="x", max_new_tokens=8, prompts_per_step=3, samples_per_prompt=2, mode=mode
    )
    settings = EpisodePlan(rollout, GuidanceConfig(), steps=10, seed=1, responses=RESPONSES)
    return SampledRollouts(
        engines, load_mode(mode), PROMPTS, settings, stop_token_ids=STOPS, is_main=True
    )


def test_single_turns_ask_once_for_what_the_step_plans() -> None:
    engines = Engines()
    source = make(engines)
    source.begin(2)
    source.begin(2)
    sequences = source.collect()
    assert engines.calls == ["start 6", "awake", "finish", "asleep"]
    plans = plan_requests(
        [PROMPTS[i] for i in prompts_of_step(5, 3, 2, 1)],
        RESPONSES,
        step=2,
        steps=10,
        rollout=RolloutConfig(prompts="x", max_new_tokens=8, samples_per_prompt=2),
        guidance=GuidanceConfig(),
        seed=1,
    )
    assert engines.requests == [[plan.request for plan in plans]]
    assert engines.sampling == [Sampling(stop_token_ids=STOPS)]
    for plan, sequence in zip(plans, sequences, strict=True):
        assert sequence.key == (2, plan.prompt.index, plan.sample_index)
        assert tuple(sequence.prompt_ids) == plan.prompt.token_ids
        assert tuple(sequence.by(Writer.TEACHER)) == plan.prefix_ids
        assert sequence.by(Writer.STUDENT)[1] == len(plan.request.token_ids)
        assert sequence.oldest_version == 4
    assert [sequence.count(Writer.TEACHER) for sequence in sequences] == [3, 0] * 3


@pytest.mark.parametrize("golden", [None, {i: (40 + i, 41, 2) for i in range(5)}])
def test_samples_that_have_arrived_are_those_that_are_collected(golden: Any) -> None:
    engines = Engines()
    source = make(engines)
    source._settings = replace(source._settings, golden=golden)
    assert source.arrived(2) is None
    source.begin(2)
    assert source.arrived(2) is None, "the engines are at it"
    engines.ready = True
    early = source.arrived(2)
    assert early is not None and source.arrived(3) is None
    assert dump_sequences(source.collect()) == dump_sequences(list(early))
    assert source.arrived(2) is None, "they were collected"


def test_an_episode_that_asks_again_has_not_arrived() -> None:
    engines = Engines()
    source = make(engines, "own_rollout:TwoTurns")
    source.begin(2)
    engines.ready = True
    assert source.arrived(2) is None
    assert len(source.collect()) == 6


def test_a_golden_answer_takes_the_place_of_the_last_sample_and_asks_for_nothing() -> None:
    answers = {i: (40 + i, 41, 2) for i in range(5)}
    engines, plain = Engines(), Engines()
    source, sampled = make(engines), make(plain)
    source._settings = replace(source._settings, golden=answers)
    for each in (source, sampled):
        each.begin(2)
    sequences, before = source.collect(), sampled.collect()
    # The others are asked for what they were asked for without answers.
    assert engines.requests == [plain.requests[0][0::2]]
    for place, (found, was) in enumerate(zip(sequences, before, strict=True)):
        if place % 2 == 0:
            assert dump_sequences([found]) == dump_sequences([was])
            continue
        prompt = PROMPTS[found.key.prompt]
        assert found.key == was.key and tuple(found.prompt_ids) == prompt.token_ids
        assert tuple(found.by(Writer.GOLDEN)) == answers[prompt.index]
        assert found.finish == "stop" and found.weight_N.sum() == 3


def test_single_turns_have_the_room_of_their_step() -> None:
    engines = Engines()
    source = make(engines)
    plan = source._settings
    grows = replace(plan.rollout, first_new_tokens=4, growth_steps=4)
    source._settings = replace(plan, rollout=grows, responses=None)
    source.begin(2)
    room = 4 + (plan.rollout.max_new_tokens - 4) // 2
    assert {request.max_new_tokens for request in engines.requests[0]} == {room}


def test_episodes_that_ask_again_are_asked_in_rounds_by_engines_that_stay_awake() -> None:
    engines = Engines()
    source = make(engines, "own_rollout:TwoTurns")
    source.begin(0)
    sequences = source.collect()
    again = [s for s in sequences if s.count(Writer.STUDENT) == 4]
    assert 0 < len(again) < 6, "some asked again, others did not"
    assert engines.calls == ["start 6", "awake", "finish", f"generate {len(again)}", "asleep"]
    second = engines.requests[1]
    assert [tuple(s.ids_N[:-2]) for s in again] == [request.token_ids for request in second]
    assert all(tuple(s.response_ids[2:4]) == TOOL for s in again)
    assert [s.weight_N.tolist()[-6:] for s in again] == [[1, 1, 0, 0, 1, 1]] * len(again)
    seeds = [request.seed for asked in engines.requests for request in asked]
    assert len(set(seeds)) == len(seeds), "a turn has a seed of its own"


def test_a_second_turn_needs_the_weights_of_the_first() -> None:
    engines = Engines()
    source = make(engines, "own_rollout:TwoTurns")
    source.begin(0)
    engines.channel.send(iter(()), 5)
    with pytest.raises(ConfigError, match=r"from step 4 to 5 in between\. Set rollout.steps_ahead"):
        source.collect()


def test_what_was_asked_for_is_in_the_state_and_collected_after_it(tmp_path: Path) -> None:
    source = make(Engines())
    assert source.state() == {}
    source.begin(3)
    files = source.state()
    (tmp_path / PENDING_FILE).write_bytes(files[PENDING_FILE])
    resumed = Engines()
    other = make(resumed)
    other.restore(tmp_path)
    other.begin(3)
    assert dump_sequences(other.collect()) == dump_sequences(source.collect())
    assert resumed.calls == []


def test_what_is_forgotten_is_asked_for_again() -> None:
    engines = Engines()
    source = make(engines)
    source.begin(1)
    source.forget()
    source.begin(1)
    assert engines.calls == ["start 6", "start 6"]


def test_a_mode_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.mode = 'multi'.*single_turn"):
        load_mode("multi")
