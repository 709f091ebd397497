"""Episodes with a calculator: vLLM continues each conversation, transformers reads it whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_commands
from transformers import AutoModelForCausalLM
from warm_engines import environment_of_commands

from megatron_tropd.config import EnvironmentConfig, GuidanceConfig, load_config
from megatron_tropd.data.conversations import Talk
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.data.sequence_files import dump_sequences
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.rollout.continuous import play_share, replay
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.environments import Environments, SharedEnvironments
from megatron_tropd.rollout.episodes import EpisodePlan, EpisodeStart
from megatron_tropd.rollout.episodes.multi_turn import MultiTurn
from megatron_tropd.rollout.source import play

TOOLS = Path(__file__).resolve().parents[2] / "examples" / "tool_use"
SAMPLING = Sampling(stop_token_ids=(2,))

pytestmark = pytest.mark.timeout(600)


class _Seen:
    """An engine that remembers what it was asked."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.requests = engine, list[list[SampleRequest]]()

    def generate(self, requests: Any, sampling: Sampling) -> list[Sample]:
        self.requests.append(list(requests))
        return self.engine.generate(requests, sampling)


def _played(engine: Any, config: Any, *, continuous: bool = False) -> list[TokenSequence]:
    """Twelve episodes of the student."""
    tokenizer = load_tokenizer(TOOLS / "student")
    prompts = load_prompts(config.rollout.prompts, tokenizer, config.rollout)[:12]
    talk = Talk(tokenizer, config.rollout)
    environment: EnvironmentConfig = config.environment
    plan = EpisodePlan(
        config.rollout, GuidanceConfig(), 9, 5, None, None, environment=environment, talk=talk
    )
    episodes = [MultiTurn(EpisodeStart(prompt, 0, 3, 3, plan)) for prompt in prompts]
    if not continuous:
        play(episodes, engine, SAMPLING, SharedEnvironments(environment, rank=0, world_size=1))
        return [episode.sequence() for episode in episodes]
    numbered = dict(enumerate(episodes))
    with Environments(environment) as environments:
        told = play_share(engine, numbered, environments, SAMPLING, workers=2)
        assert not environments._copies, "each ended with its episode"
    others = [MultiTurn(EpisodeStart(prompt, 0, 3, 3, plan)) for prompt in prompts]
    for number, events in told.items():
        replay(others[number], events)
    found = [episode.sequence() for episode in others]
    assert dump_sequences(found) == dump_sequences([e.sequence() for e in episodes])
    return found


@pytest.mark.usefixtures("warm_engines")
def test_log_probs_of_all_turns_are_those_of_the_whole_sequence(tmp_path: Path) -> None:
    config = load_config(TOOLS / "tropd.toml")
    folder = TOOLS / "student"
    settings: dict[str, Any] = {"max_model_len": 128, "cpu_kv_gib": 0.25, "threads": 1}
    with RolloutEngine(folder, log_file=tmp_path / "log", **settings) as engine:
        seen = _Seen(engine)
        sequences = _played(seen, config)
        again = _played(engine, config)
        continuous = _played(engine, config, continuous=True)
        last = _played(engine, config)
    assert dump_sequences(sequences) == dump_sequences(again), "the same bits each time"
    assert dump_sequences(last) == dump_sequences(again), "the engine samples as before"
    alike = [a.ids_N.tolist() == b.ids_N.tolist() for a, b in zip(continuous, again, strict=True)]
    assert alike.count(True) >= 10, "but for the last bits, time changes nothing"
    assert len(seen.requests) > 2 and {s.fields["episode"]["end"] for s in sequences} == {"done"}
    whole = {s.key.prompt: tuple(s.ids_N.tolist()) for s in sequences}
    for asked in seen.requests:
        for request in asked:
            ids = request.token_ids
            assert any(one[: len(ids)] == ids for one in whole.values())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence in [*sequences, *continuous]:
        tokens = torch.from_numpy(sequence.ids_N)
        with torch.no_grad():
            wanted = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        wanted = wanted.gather(1, tokens[1:, None])[:, 0]
        student = torch.from_numpy(sequence.writer_N[1:] == Writer.STUDENT)
        found = torch.from_numpy(sequence.engine_logprobs_N)[1:]
        assert student.sum() > 5 and found[~student].isnan().all()
        torch.testing.assert_close(found[student], wanted[student], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_learns_to_call_its_tool_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    environment = environment_of_commands(tmp_path / "warm", TOOLS)
    root = tmp_path / "run"
    short = ["train.steps=3", "train.warmup_steps=0", "rollout.prompts_per_step=8"]
    more = ["evaluation.num_problems=16", "evaluation.teacher=false", "evaluation.every=0"]
    often = ["run.checkpoint_every=1", "run.keep_checkpoints=3", "run.trajectories_every=1"]
    command = ["distill", TOOLS / "tropd.toml", f"run.dir={root}", *short, *more, *often]
    run = warm_commands.run(command, environment=environment)
    assert run.returncode == 0, run.stderr
    steps = _lines(root / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["environment/turns"] > 1 and step["environment/failed_share"] == 0
        assert 0 < step["environment/info/correct"] < 1 and step["environment/drifted_share"] < 0.1
        assert step["engine_gap_max"] < 1e-3
    examples = [line for dump in (root / "trajectories").glob("*") for line in _lines(dump)]
    assert {w for one in examples for w in one["segment"]} == {"student", "context"}
    assert {one["correct"] for one in examples} == {True, False}
    _forget_last_step(root)
    run = warm_commands.run(command, environment=environment)
    assert run.returncode == 0, run.stderr
    again = _lines(root / "metrics.jsonl")
    assert [step["step"] for step in again] == [1, 2, 3]
    for name in ("loss", "grad_norm", "tokens_student", "environment/turns", "reverse_kl"):
        assert again[-1][name] == steps[-1][name]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _forget_last_step(root: Path) -> None:
    """Leave the run as a crash in its third step would have."""
    shutil.rmtree(root / "checkpoints" / "step_000003")
    shutil.rmtree(root / "student_hf")
    (root / "summary.json").unlink()
