"""One run whose served teacher hangs, dies, comes back and is mistaken, and ends as if it had not.

The server is a stand-in that speaks vLLM's protocol (tests/teacher_stand_in.py). The tests are the
chapters of one story, in the order of this file; each costs one start of the command.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reliability import record
from warm_commands import Command
from warm_engines import environment_of_commands

from tests.integration.test_erpd import PROMPTS, record_answers
from tests.teacher_stand_in import StandIn
from tests.vllm_serve import NAME, PAIR

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, EACH = 24, 4
"""Steps of the run; new ones in each chapter before something happens."""
REPEATED = "the unfinished step and those since the last checkpoint (saved every 2) are repeated"
CONFIG = """
[model]
student = "{pair}/student"
teacher = "{pair}/teacher"
[teacher]
placement = "served"
address = ["{address}"]
served_model = "{name}"
timeout_seconds = 1.0
[rollout]
prompts = "{folder}/prompts.jsonl"
recorded = "{folder}/rollouts.jsonl"
max_new_tokens = 64
prompts_per_step = {prompts}
samples_per_prompt = 2
engine_cpu_kv_gib = 0.25
[loss]
method = "tropd"
top_k = 8
[train]
steps = {steps}
lr = 2e-4
tokens_per_micro_batch = 1024
[run]
dir = "{folder}/run"
checkpoint_every = 2
timeout_minutes = 0.15
trajectories_every = 0
tensorboard = false
"""


class Story:
    """A run folder, and the server that its teacher is behind."""

    def __init__(self, folder: Path) -> None:
        """Start the server."""
        record_answers(folder)
        self.folder, self.run = folder, folder / "run"
        self.server = StandIn(PAIR / "teacher", seconds=0.03)
        self.config = folder / "served.toml"
        self.config.write_text(self._text())

    def _text(self, **changes: Any) -> str:
        known = {"pair": PAIR, "address": self.server.address, "name": NAME, "folder": self.folder}
        return CONFIG.format(**known | {"prompts": PROMPTS, "steps": STEPS} | changes)

    def start(self, *overrides: str) -> Command:
        """The same command again."""
        environment = environment_of_commands(self.folder / "warm")
        return Command(["distill", self.config, *overrides], environment=environment)

    def steps(self) -> int:
        """Steps logged so far."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for_steps(self, command: Command) -> float:
        """Wait until this start has made some new ones; seconds to the first of them."""
        began, before, first = time.monotonic(), self.steps(), 0.0
        while (now := self.steps()) < before + EACH:
            before = min(before, now)  # those later than the checkpoint are cut off
            first = first or (now > before) * (time.monotonic() - began)
            assert command.poll() is None, command.communicate()
            time.sleep(0.01)
        return first

    def end(self, command: Command) -> tuple[float, dict[str, Any], str]:
        """Wait for the end: seconds, the reason, and what was printed."""
        began = time.monotonic()
        _, text = command.communicate(timeout=300)
        file = self.run / "failure.json"
        failure = json.loads(file.read_text()) if file.exists() else {}
        return time.monotonic() - began, failure, text


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The run of all chapters."""
    told = Story(tmp_path_factory.mktemp("served"))
    yield told
    told.server.kill()


def test_a_hung_server_ends_the_run_with_its_name(story: Story):
    command = story.start()
    story.wait_for_steps(command)
    story.server.send_signal(signal.SIGSTOP)
    seconds, failure, text = story.end(command)
    assert (
        command.returncode == 75 and failure["kind"] == "engine" and failure["phase"] == "teacher"
    )
    said = f"server 0 ({story.server.address}) did not answer for 1 s"
    assert said in failure["message"] and said in text
    story.server.send_signal(signal.SIGCONT)
    story.hung = seconds  # type: ignore[attr-defined]


def test_a_killed_server_ends_it_too_after_it_went_on(story: Story):
    command = story.start()
    back = story.wait_for_steps(command)
    record(
        "a teacher's server hangs",
        how="SIGSTOP between two steps, teacher.timeout_seconds = 1, run.timeout_minutes = 0.15",
        seen="exit 75: which server, and that it did not answer",
        stops=story.hung,  # type: ignore[attr-defined]
        back=back,
        lost=REPEATED,
    )
    story.server.kill()
    story.killed, failure, text = story.end(command)  # type: ignore[attr-defined]
    assert command.returncode == 75 and failure["kind"] == "engine"
    assert f"server 0 ({story.server.address}) is not there" in failure["message"]
    assert "Start `vllm serve` with the teacher there" in text


def test_another_model_at_the_address_is_refused(story: Story):
    before = story.steps()
    story.server.start(PAIR / "student")
    command = story.start()
    seconds, failure, text = story.end(command)
    assert command.returncode == 2 and failure["kind"] == "input" and story.steps() <= before
    assert "is another model" in text and "what the teacher said when the run began" in text
    record(
        "another model at the address of a teacher's server",
        how="the student served under the teacher's name, the run started again",
        seen="exit 2: which server, and by how much its log-probs differ from the teacher's",
        stops=seconds,
        back=None,
        lost="nothing; no step is made with it",
    )
    story.server.kill()


def test_a_server_that_is_started_again_meanwhile_costs_nothing(story: Story):
    story.server.start(PAIR / "teacher")
    command = story.start()
    back = story.wait_for_steps(command)
    record(
        "a teacher's server dies",
        how="SIGKILL between two steps",
        seen="exit 75: which server, and that it is not there",
        stops=story.killed,  # type: ignore[attr-defined]
        back=back,
        lost=REPEATED,
    )
    story.server.kill()
    restart = threading.Timer(0.5, lambda: story.server.start(PAIR / "teacher"))
    restart.start()
    _, failure, text = story.end(command)
    restart.join()
    assert command.returncode == 0 and not failure, text
    record(
        "a teacher's server dies and is started again",
        how="SIGKILL between two steps, back after half a second",
        seen="nothing but a line in the log; the server is checked again",
        stops=None,
        back=None,
        lost="nothing",
    )
    assert story.steps() == STEPS
    log = (story.run / "logs" / "rank_000.log").read_text()
    assert "teacher server 0 (" in log and "is not there" in log
    first = _metrics(story.run)
    calm = story.start(f"run.dir={story.folder / 'calm'}")
    calm.communicate(timeout=300)
    assert calm.returncode == 0
    for one, other in zip(first, _metrics(story.folder / "calm"), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def _metrics(folder: Path) -> list[list[float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[name] for name in ("loss", "grad_norm", "k1")] for line in lines]
