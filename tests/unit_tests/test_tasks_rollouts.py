"""Recorded rollouts: the same file wherever the writing was cut, and never two mixed in one."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli.main import main
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.data.prefixes import PlannedSample, plan_requests
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.recorded import RecordedTrajectories
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import Writer
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.recorded_rollouts import RolloutRound, write_rollouts
from megatron_tropd.tasks.sample_files import model_identity

PROMPTS = [Prompt(i, f"p{i}", (5 + i, 6), {}) for i in range(6)]
RESPONSES = {i: (TeacherResponse(i, 0, (30, 31, 32, 2), "stop"),) for i in range(6)}
ROUND = RolloutRound(
    rollout=RolloutConfig(
        prompts="p", max_new_tokens=8, prompts_per_step=5, samples_per_prompt=2, temperature=0.8
    ),
    guidance=GuidanceConfig(),
    number=0,
    rounds=4,
    seed=5,
)


class BatchEngine:
    """Answers by seed; log-probs also depend on the batch, as last bits do."""

    def __init__(self, fail_after: int = 99) -> None:
        self.calls, self.fail_after = 0, fail_after

    def generate(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        """One or two tokens each."""
        if self.calls == self.fail_after:
            raise RuntimeError("killed")
        self.calls += 1
        first = requests[0].seed % 1000 / 1000
        return [Sample((3 + request.seed % 200, 2), (-first, -1.0), "stop") for request in requests]


@pytest.fixture
def write(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``write(path, engine, which=..., weights=...)`` in batches of three."""
    monkeypatch.setattr("megatron_tropd.tasks.sample_files._REQUESTS_PER_BATCH", 3)
    tokenizer = load_tokenizer(tiny_llama)

    def call(path: Path, engine: BatchEngine, which: RolloutRound = ROUND, **changed) -> int:
        sampling = Sampling(temperature=which.rollout.temperature, stop_token_ids=(2,))
        settings = {"sampling": sampling, "weights": "abc"} | changed
        plans = which.plan(PROMPTS, RESPONSES)
        return write_rollouts(lambda: engine, plans, tokenizer, path, which=which, **settings)

    return call


def test_a_round_plans_what_the_trainers_step_of_that_number_does() -> None:
    which = dataclasses.replace(ROUND, number=2)
    expected: list[PlannedSample] = plan_requests(
        [PROMPTS[i] for i in prompts_of_step(6, 5, 2, 5)],
        RESPONSES,
        step=2,
        steps=4,
        rollout=ROUND.rollout,
        guidance=ROUND.guidance,
        seed=5,
    )
    assert which.plan(PROMPTS, RESPONSES) == expected
    seeds = {p.request.seed for k in range(4) for p in _plans(k)}
    assert len(seeds) == 4 * 10
    assert [max(len(p.prefix_ids) for p in _plans(k)) for k in range(4)] == [3, 3, 2, 0]
    with pytest.raises(ConfigError, match=r"in 0\.\.3 for 4 rounds, found 4"):
        dataclasses.replace(ROUND, number=4)


def _plans(number: int) -> list[PlannedSample]:
    return dataclasses.replace(ROUND, number=number).plan(PROMPTS, RESPONSES)


def test_the_file_is_what_the_dataset_reads(write: Callable[..., int], tmp_path: Path) -> None:
    assert write(tmp_path / "r.jsonl", BatchEngine()) == 10
    data = RecordedTrajectories(tmp_path / "r.jsonl", seq_length=8, vocab_size=259)
    plans = ROUND.plan(PROMPTS, RESPONSES)
    assert len(data) == len(plans) == 10
    for item, plan in zip(data, plans, strict=True):
        start, prefix = len(plan.prompt.token_ids) - 1, len(plan.prefix_ids)
        assert int((item["writers"] == Writer.TEACHER).sum()) == prefix
        assert item["weights"].tolist() == [0] * start + [1] * (prefix + 2) + [0] * (
            8 - start - prefix - 2
        )
        assert int(item["labels"][start + prefix]) == 3 + plan.request.seed % 200
        assert float(item["behaviour_logprobs"][start + prefix + 1]) == -1.0
    first = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])
    assert first["writers"] == [["context", 2], ["teacher", 3], ["student", 2]]
    assert first["engine_logprobs"][:5] == [None] * 5 and first["fields"]["weights"] == "abc"


def test_a_cut_file_ends_as_the_same_bytes(write: Callable[..., int], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(whole, BatchEngine())
    with pytest.raises(RuntimeError, match="killed"):
        write(cut, BatchEngine(fail_after=2))
    lines = whole.read_bytes().splitlines(keepends=True)
    assert cut.read_bytes() == b"".join(lines[:7])
    for kept, torn in ((6, b""), (5, b'{"prompt_ind'), (1, b"\0\0\0"), (0, lines[0][:-1])):
        cut.write_bytes(b"".join(lines[:kept]) + torn)
        assert write(cut, BatchEngine()) == 10 - max(kept - 1, 0)
        assert cut.read_bytes() == whole.read_bytes()
    finished = BatchEngine()
    assert write(cut, finished) == 0 and finished.calls == 0


def test_rollouts_are_never_mixed(write: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, BatchEngine())
    before = path.read_bytes()
    hotter = dataclasses.replace(ROUND.rollout, temperature=0.9)
    cases: list[tuple[dict, str]] = [
        ({"weights": "def"}, "weights: 'abc' in the file, 'def' asked for"),
        ({"which": dataclasses.replace(ROUND, number=1)}, "round: 0 in the file, 1 asked for"),
        ({"which": dataclasses.replace(ROUND, seed=6)}, "seed: 5 in the file, 6 .*requests: "),
        ({"which": dataclasses.replace(ROUND, rollout=hotter)}, r"temperature: 0\.8 in the file"),
        ({"resume": False}, "exists"),
    ]
    for changed, message in cases:
        with pytest.raises(InputError, match=message):
            write(path, BatchEngine(), **changed)
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b"\n{", b"\n", 1))
    with pytest.raises(InputError, match=r"line \d: expected a JSON object.*Cut the file off"):
        write(path, BatchEngine())


def test_weights_differ_by_any_byte(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_llama, folder)
    assert model_identity(folder, whole=True) == model_identity(tiny_llama, whole=True)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert model_identity(folder, whole=True) != model_identity(tiny_llama, whole=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--max-new-tokens", "256"], r"--max-new-tokens must be in 1\.\.255"),
        (["--max-new-tokens", "0"], r"must be in 1\.\.255 .*, found 0"),
        (["--round", "3", "--rounds", "2"], r"round must be in 0\.\.1 for 2 rounds"),
        (["--responses", "x"], "--responses needs --rounds"),
        (["--temperature", "0"], "temperature must be above 0"),
        (["--prompts-per-round", "9"], "exceeds the 2 prompts"),
        (["--prompts", "absent"], "prompts file absent cannot be read"),
        (["--student", "absent"], "HF model folder at absent"),
    ],
)
def test_bad_options_are_named(
    tiny_llama: Path, tmp_path: Path, changed: list[str], message: str, capsys
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    options = ["--student", str(tiny_llama), "--prompts", str(prompts)]
    options += ["--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "8"]
    assert main(["rollouts", *options, *changed]) == 2
    assert re.search(message, capsys.readouterr().err)
