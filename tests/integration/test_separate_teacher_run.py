"""Runs whose teacher has ranks of its own: by the command, and through its ranks' faults.

Recorded rollouts, so that no engine is needed. The tests are the chapters of one story, in the
order of this file; each costs one start of the command.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from warm_commands import Command

from tests.integration.test_erpd import PAIR, PROMPTS, record_answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
TEACHERS_RANK = 1
CONFIG = """
[model]
student = "{pair}/student"
teacher = "{pair}/teacher"
{teacher}
[rollout]
prompts = "{folder}/prompts.jsonl"
recorded = "{folder}/rollouts.jsonl"
max_new_tokens = 64
prompts_per_step = {prompts}
samples_per_prompt = 2
placement = "separate"  # no engine is started, and none is asked
[loss]
method = "tropd_exact"
[train]
steps = {steps}
lr = 2e-4
tokens_per_micro_batch = 1024
[run]
dir = "{folder}/run"
checkpoint_every = 2
timeout_minutes = 0.25
trajectories_every = 0
tensorboard = false
"""
SEPARATE = '[teacher]\nplacement = "separate"\nranks = 1'


class Story:
    """A run folder, and one of a run that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        """Write what the runs read."""
        record_answers(folder)
        self.folder, self.run = folder, folder / "run"
        for name, teacher in (("separate", SEPARATE), ("resident", "")):
            known = dict(pair=PAIR, folder=folder, prompts=PROMPTS, steps=STEPS, teacher=teacher)
            (folder / f"{name}.toml").write_text(CONFIG.format(**known))

    def start(self, *overrides: str, file: str = "separate") -> Command:
        """The same command again."""
        return Command(["distill", self.folder / f"{file}.toml", *overrides])

    def whole(self, name: str, file: str) -> list[dict[str, Any]]:
        """The metrics of a run from start to end in a folder of its own."""
        command = self.start(f"run.dir={self.folder / name}", file=file)
        printed = command.communicate(timeout=600)
        assert command.returncode == 0, printed
        return _metrics(self.folder / name)

    def disturbed(self, by: signal.Signals) -> tuple[int, dict[str, Any], str]:
        """Start, let some steps pass, send the teacher's rank a signal; how it ended."""
        beat = self.run / "logs" / "heartbeats" / f"rank_{TEACHERS_RANK:05d}.json"
        command, before = self.start(), len(_metrics(self.run))
        while len(_metrics(self.run)) < before + 3 or not beat.exists():
            before = min(before, len(_metrics(self.run)))
            assert command.poll() is None, command.communicate()
            time.sleep(0.01)
        os.kill(json.loads(beat.read_text())["pid"], by)
        _, text = command.communicate(timeout=300)
        code = command.returncode
        return code, json.loads((self.run / "failure.json").read_text()), text


def _metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _numbers(folder: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    timed = ("second", "gib", "waiting")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in timed)}
        for line in _metrics(folder)
    ]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The runs of all chapters."""
    yield Story(tmp_path_factory.mktemp("separate"))


def test_the_run_is_the_one_with_a_resident_teacher(story: Story):
    apart = story.whole("calm", "separate")
    resident = story.whole("resident", "resident")
    assert len(apart) == len(resident) == STEPS
    for one, other in zip(apart, resident, strict=True):
        for name in ("loss", "grad_norm", "reverse_kl", "tokens_student"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    log = (story.folder / "calm" / "logs" / "rank_001.log").read_text()
    assert "Traceback" not in log


def test_a_killed_rank_of_the_teacher_is_the_one_reason(story: Story):
    code, failure, text = story.disturbed(signal.SIGKILL)
    assert code == 75 and (failure["kind"], failure["rank"]) == ("killed", TEACHERS_RANK)
    assert "Rank 1 (the teacher's) was killed by signal 9" in failure["message"]
    assert failure["message"] in text


def test_a_hung_rank_of_the_teacher_is_named_by_the_student(story: Story):
    code, failure, _ = story.disturbed(signal.SIGSTOP)
    assert code == 75 and (failure["kind"], failure["rank"]) == ("hung", TEACHERS_RANK)
    assert "Stopped or gone: rank 1 (the teacher's, " in failure["message"]


def test_the_run_ends_as_if_nothing_had_happened(story: Story):
    command = story.start()
    printed = command.communicate(timeout=600)
    assert command.returncode == 0, printed
    assert not (story.run / "failure.json").exists()
    assert _numbers(story.run) == _numbers(story.folder / "calm")


def test_an_error_of_the_student_ends_both_kinds_of_rank_at_once(story: Story):
    """Its ranks do not wait until the teacher hears that they are leaving."""
    began = time.monotonic()
    command = story.start("train.lr=1e30", f"run.dir={story.folder / 'nan'}", "train.clip_grad=0")
    _, text = command.communicate(timeout=120)
    failure = json.loads((story.folder / "nan" / "failure.json").read_text())
    assert command.returncode == 1 and "finite" in failure["message"], (text, failure)
    assert time.monotonic() - began < 60
