"""The first steps of a run: what is asked for, of which engines, and what is written down."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import GuidanceConfig, RolloutConfig, load_config
from megatron_tropd.data.prefixes import plan_sample
from megatron_tropd.data.samples import Blend, BlendTrace, Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import shared_stops
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.distill.metrics import sequence_metrics
from megatron_tropd.rollout.warmup import WarmupEngines, sampling_of_step

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
REQUESTS = [SampleRequest((1, 2), 3, 4)]


def rollout(**settings: object) -> RolloutConfig:
    return RolloutConfig(prompts="x", max_new_tokens=8, **settings)


def asked(settings: RolloutConfig, step: int) -> Sampling:
    return sampling_of_step(settings, step, stops=(2,), shared_stops=(2, 7))


def test_the_radius_falls_to_nothing():
    settings = rollout(behaviour="blended", epsilon=0.02, warmup_steps=4)
    found = [asked(settings, step).blend for step in range(6)]
    assert found[:2] == [Blend("blended", 0.02, 25, (2, 7)), Blend("blended", 0.015, 25, (2, 7))]
    assert [blend and blend.strength for blend in found[2:]] == [0.01, 0.005, None, None]
    assert asked(settings, 4) == Sampling(stop_token_ids=(2,))
    constant = rollout(
        behaviour="mixture", teacher_share=0.3, warmup_steps=4, warmup_schedule="constant"
    )
    found = [asked(constant, step).blend for step in (0, 3, 4)]
    assert [blend and blend.strength for blend in found] == [0.3, 0.3, None]
    assert asked(rollout(behaviour="skd", teacher_top_k=9), 3).blend == Blend("skd", 0.0, 9, (2, 7))


def test_no_radius_and_no_warmup_are_the_student():
    for settings in (
        rollout(),
        rollout(behaviour="blended", epsilon=0.0),
        rollout(behaviour="blended", warmup_steps=0),
        rollout(behaviour="mixture", teacher_share=0.0),
    ):
        assert not settings.asks_teacher
        assert asked(settings, 0) == Sampling(stop_token_ids=(2,))


def test_a_cooled_student_warms_up():
    settings = rollout(behaviour="cooled", warmup_temperature=0.5, warmup_steps=4)
    assert [asked(settings, step).temperature for step in range(5)] == [0.5, 0.625, 0.75, 0.875, 1]
    assert not settings.asks_teacher and asked(settings, 0).blend is None
    constant = rollout(behaviour="cooled", warmup_temperature=0.5, warmup_schedule="constant")
    assert [asked(constant, step).temperature for step in (0, 49, 50)] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"placement": "separate"},
        {"steps_ahead": 1},
        {"temperature": 0.9},
        {"top_p": 0.5},
        {"mode": "mine:Mine"},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused(wrong: dict[str, object]):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf'"blended" needs rollout\.{name} = .*, found'):
        rollout(behaviour="blended", **wrong)
    rollout(behaviour="blended", epsilon=0.0, **wrong)  # the student samples


def test_importance_needs_to_know_what_sampled():
    toml = EXAMPLES / "opd.toml"
    weighted = ["loss.importance=truncated"]
    with pytest.raises(ConfigError, match=r'rollout\.behaviour = "cooled"'):
        load_config(toml, [*weighted, "rollout.behaviour=cooled"])
    load_config(toml, [*weighted, "rollout.behaviour=blended"])


class _Engines:
    """Counts what it is asked."""

    receivers = (0,)

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name
        self.channel, self.version = self, 0

    def _note(self, what: str) -> None:
        self._calls.append(f"{self._name} {what}")

    def send(self, tensors: object, version: int) -> None:
        self.version = version
        self._note(f"got {version}")

    def awake(self) -> nullcontext[None]:
        return nullcontext()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        self._note("generates")
        return []

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        self._note("starts")

    def finish(self) -> list[Sample]:
        self._note("finishes")
        return []

    def __enter__(self) -> "_Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self._note("ends")


def test_engines_of_the_warmup_live_as_long_as_it():
    calls: list[str] = []
    blend = Sampling(blend=Blend("blended", 0.1))
    with WarmupEngines(_Engines(calls, "student"), lambda: _Engines(calls, "both"), 2) as engines:
        assert not calls and engines.channel.receivers == (0,)
        engines.channel.send([], 0)
        engines.start(REQUESTS, blend)
        engines.finish()
        engines.generate(REQUESTS, Sampling())
        with engines.awake():
            engines.channel.send([], 1)
        assert engines.channel.version == 1
        engines.channel.send([], 2)
        engines.start(REQUESTS, Sampling())
        engines.finish()
    assert calls == [
        *("student got 0", "both got 0", "both starts", "both finishes", "student generates"),
        *("student got 1", "both got 1", "student got 2", "both ends"),
        *("student starts", "student finishes", "student ends"),
    ]


def test_a_run_resumed_after_the_warmup_starts_no_other_engines():
    calls: list[str] = []
    engines = WarmupEngines(_Engines(calls, "student"), lambda: _Engines(calls, "both"), 2)
    engines.channel.send([], 5)
    engines.__exit__()
    assert calls == ["student got 5", "student ends"]


def sequence(blend: BlendTrace | None) -> TokenSequence:
    plan = plan_sample(
        Prompt(3, "p", (5, 6), {}), 0, None, step=1, steps=9, max_new_tokens=4,
        guidance=GuidanceConfig(), seed=1,
    )  # fmt: skip
    return plan.sequence(Sample((7, 2), (-1.0, -2.0), "stop", blend), step=1, version=1)


def test_a_sequence_knows_what_sampled_it():
    trace = BlendTrace((-0.5, -0.25), (0.01, 0.03), (1.0, 0.5), (1, 2))
    blended, plain = sequence(trace), sequence(None)
    assert blended.behaviour_logprobs_N[2:].tolist() == [-0.5, -0.25]
    assert blended.engine_logprobs_N[2:].tolist() == [-1.0, -2.0]
    assert plain.behaviour_logprobs_N[2:].tolist() == [-1.0, -2.0] and not plain.fields
    metrics = sequence_metrics([blended, plain, blended], step=1)
    assert metrics["behaviour_kl"] == pytest.approx(0.02)
    assert metrics["behaviour_teacher_share"] == 0.75
    assert metrics["tokens_per_teacher_pass"] == 1.0
    assert "behaviour_kl" not in sequence_metrics([plain], step=1)


def test_ends_that_differ_are_shared(tmp_path: Path):
    """As the folders name them: in the tokenizer, generation_config.json and config.json."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in (EXAMPLES / "teacher").iterdir():
        if file.suffix != ".safetensors":
            (teacher / file.name).write_bytes(file.read_bytes())
    assert shared_stops(EXAMPLES / "student", teacher) == ()
    (teacher / "generation_config.json").write_text('{"eos_token_id": [2, 17]}')
    assert shared_stops(EXAMPLES / "student", teacher) == (2, 17)
    assert shared_stops(teacher, EXAMPLES / "student") == (2, 17)


def test_pair_and_prompts_are_checked_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(*overrides: str) -> None:
        load_inputs(load_config(EXAMPLES / "trb.toml", list(overrides)))

    prompts = tmp_path / "prompts.jsonl"
    lines = (EXAMPLES / "prompts.jsonl").read_text().splitlines()[:31]
    prompts.write_text("\n".join([*lines, '{"prompt": "5"}']) + "\n")
    with pytest.raises(InputError, match="prompt 31 is one token long"):
        load(f"rollout.prompts={prompts}")
    load(f"rollout.prompts={prompts}", "rollout.behaviour=student")
    with pytest.raises(InputError, match=r"context of 128 tokens, prompt and response need 1\d\d"):
        load("rollout.max_new_tokens=92")
    load("rollout.max_new_tokens=92", "rollout.draft_tokens=2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="found CUDA"):
        load()
