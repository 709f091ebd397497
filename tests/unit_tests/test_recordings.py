"""Recorded rollouts as the trainer's source: order, checks, grades."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, load_config
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.sequence_files import FORMAT, record_of
from megatron_tropd.data.tokenizers import fingerprint, load_tokenizer
from megatron_tropd.distill import recordings
from megatron_tropd.distill.recordings import ADVANTAGE, OUTCOME, load_recorded
from megatron_tropd.losses import HiddenStatesSignal, ReferencedSignal, preset
from megatron_tropd.rollout.recorded import RecordedRollouts
from megatron_tropd.tasks.grading import Grade, Grader
from megatron_tropd.teacher import signal_of

PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
VOCAB = 320
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(PAIR / "student")


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Load:
    """Write six prompts with two answers each, the first right, and load them as a run does."""
    config = load_config(
        PAIR / "erpd_teacher.toml",
        [
            f"rollout.recorded={tmp_path}/rollouts.jsonl",
            "rollout.samples_per_prompt=2",
            "rollout.prompts_per_step=2",
        ],
    )
    prompts = load_prompts(config.rollout.prompts, tokenizer, config.rollout, max_prompt_tokens=99)

    def made(index: int, sample: int) -> TokenSequence:
        prompt = prompts[index]
        answer = str(prompt.fields["answer"]) if sample == 0 else "none"
        ids = tokenizer(f"#### {answer}", add_special_tokens=False)["input_ids"]
        runs = (Writer.CONTEXT, prompt.token_ids), (Writer.STUDENT, ids)
        key = SampleKey(0, prompt.index, sample)
        return TokenSequence.of_runs(key, *runs, logprobs=[-0.5] * len(ids))

    def run(
        change: Callable[[list[TokenSequence]], list[TokenSequence]] = lambda all_of: all_of,
        tokenizers: str | None = None,
        **settings: Any,
    ) -> list[list[TokenSequence]]:
        sequences = change([made(index, sample) for index in range(6) for sample in range(2)])
        header = {"format": FORMAT, "tokenizer": tokenizers or fingerprint(tokenizer)}
        lines = [header, *map(record_of, sequences)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(str(config.rollout.recorded)).write_text(text)
        changed = replace(config, rollout=replace(config.rollout, **settings))
        groups = load_recorded(changed, prompts, tokenizer, VOCAB)
        assert groups is not None
        return groups

    return run


def test_answers_are_graded_against_the_others_of_their_prompt(load: Load):
    groups = load()
    assert [[s.key.sample for s in group] for group in groups] == [[0, 1]] * 6
    for group in groups:
        assert [s.fields[OUTCOME] for s in group] == [1.0, 0.0]
        assert [s.fields[ADVANTAGE] for s in group] == [0.5, -0.5]


def test_a_sample_without_a_verdict_is_neither_better_nor_worse(load: Load, monkeypatch, capsys):
    class Failing(Grader):
        def grade(self, response, problem):
            """Fail at answers that are right, in every second prompt."""
            given = super().grade(response, problem)
            odd = int(problem["answer"]) % 2
            return Grade(None, "it died") if given.correct and odd else given

    monkeypatch.setattr(recordings, "grader_of", Failing)
    groups = load()
    found = {tuple(s.fields[ADVANTAGE] for s in group) for group in groups}
    assert found == {(0.5, -0.5), (0.0, 0.0)}
    assert {s.fields[OUTCOME] for group in groups for s in group} == {0.0, 1.0}
    assert "the grader gave no verdict on" in capsys.readouterr().err


def test_each_epoch_has_every_group_once_and_a_step_is_known_by_its_number(load: Load):
    groups = load()

    def steps(first: int, last: int, seed: int = 7) -> list[list[tuple[int, ...]]]:
        source, seen = RecordedRollouts(groups, prompts_per_step=2, seed=seed), []
        for step in range(first, last):
            source.begin(step)
            source.begin(step + 1)  # harmless: this step's are asked for
            seen.append([tuple(s.key) for s in source.collect()])
        assert source.state() == {}
        return seen

    whole = steps(0, 6)
    assert all(key[0] == step for step, keys in enumerate(whole) for key in keys)
    for epoch in (whole[:3], whole[3:]):
        named = sorted(key[1:] for keys in epoch for key in keys)
        assert named == sorted(s.key[1:] for group in groups for s in group)
    assert steps(4, 6) == whole[4:], "a resumed run goes on as it would have"
    assert steps(0, 6, seed=8) != whole


def test_a_file_that_does_not_fit_is_refused_by_name(load: Load):
    with pytest.raises(ConfigError, match=r"samples_per_prompt = 2 must be .* has 1 or 2 a prompt"):
        load(lambda all_of: all_of[:-1])
    with pytest.raises(ConfigError, match="prompts_per_step = 7 exceeds the 6 prompts"):
        load(prompts_per_step=7)
    with pytest.raises(ConfigError, match=r"max_new_tokens is 1\. Raise it"):
        load(max_new_tokens=1)
    with pytest.raises(InputError, match="expected the tokenizer"):
        load(tokenizers="another")
    with pytest.raises(InputError, match="prompt 1, sample 0: expected the ids"):
        load(lambda all_of: [_of_another_prompt(s) for s in all_of])
    with pytest.raises(InputError, match="holds no trajectory"):
        load(lambda all_of: [])


def _of_another_prompt(sequence: TokenSequence) -> TokenSequence:
    return sequence.replace(key=sequence.key._replace(prompt=sequence.key.prompt + 1))


def test_a_source_without_references_says_so():
    config: Config = load_config(PAIR / "erpd.toml")
    assert signal_of(config) is ReferencedSignal
    plain = replace(config, teacher=replace(config.teacher, reference=None), loss=preset("opd"))
    assert signal_of(plain) is HiddenStatesSignal
    own = replace(config, teacher=replace(config.teacher, placement="own_teacher:Indifferent"))
    with pytest.raises(ConfigError, match="'own_teacher:Indifferent' takes no reference"):
        signal_of(own)
