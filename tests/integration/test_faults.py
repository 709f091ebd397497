"""One run that meets one fault after the other, each for real, and ends as if there had been none.

Every fault ends the command within a bounded time with one reason in failure.json and an exit code
that says whether to start again; nothing is left running; the next start goes on. The tests are the
chapters of one story: in the order of this file, each costs one start.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hold
import pytest
import warm_commands
from calm_run import TROPD, assert_same
from hold import Hold
from machine import why_not
from reliability import are_recorded, record
from warm_engines import environment_of_commands

from slurm.testcluster.runs import small_file_system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LITTLE_ELSE = ("run.trajectories_every=0", "run.tensorboard=false")
STANDS_STILL = "run.timeout_minutes=0.4"
HELD = "TROPD_TEST_HOLD"
REPEATED = "the unfinished step and those since the last checkpoint (saved every 2) are repeated"
# The wall clock jumps by a year with every look at it.
SITE = """
import os, time
if os.environ.get("TEST_CLOCK"):
    looks, wall = [0], time.time
    def jumping():
        looks[0] += 1
        return wall() + (3e7 if looks[0] % 2 else -3e7)
    time.time = jumping
"""


@dataclass
class Ended:
    """How one start of the command ended."""

    code: int
    text: str
    failure: dict[str, Any] | None
    logged: int
    """Steps in the metrics."""
    seconds: float
    """From the fault to the end of the command."""
    left_running: list[str]
    logs: str = ""
    kept: list[str] = field(default_factory=list)
    """Names in the folder of checkpoints."""


class Command:
    """``tropd distill``, started again and again in the same folder."""

    def __init__(self, config: Path, folder: Path, site: Path):
        self.config, self.folder, self.site = config, folder, site
        self.back: list[float] = []
        """Seconds from each start to its first new step."""

    def start(self, *overrides: str, fresh: bool = False, **environment: str) -> None:
        """With ``fresh``, command, ranks and engine are started as by a shell; else forked.

        When seconds are written down, all are.
        """
        fresh = fresh or are_recorded()
        self._mark = f"TROPD_TEST={self.folder}"
        self._before, self._started = self.steps_logged(), time.monotonic()
        words = ["distill", str(self.config), f"run.dir={self.folder}", *LITTLE_ELSE, *overrides]
        path = os.pathsep.join([str(self.site), os.environ.get("PYTHONPATH", "")])
        known = os.environ | {"PYTHONPATH": path}
        if not fresh:
            known = environment_of_commands(self.site.with_name("warm"), self.site)
        known |= {"TROPD_TEST": str(self.folder)} | environment
        if fresh:
            self.process: subprocess.Popen | warm_commands.Command = subprocess.Popen(
                [*TROPD, *words],
                env=known,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        else:
            self.process = warm_commands.Command(words, environment=known)

    def steps_logged(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for_steps(self, number: int) -> None:
        """Until this start has logged so many steps that were not there before it began."""
        self._wait_for(lambda: self._new_steps() >= 1, "a step")
        self.back.append(time.monotonic() - self._started)
        self._wait_for(lambda: self._new_steps() >= number, f"{number} steps")

    def _new_steps(self) -> int:
        # Metrics later than the checkpoint are cut off when a run resumes.
        now = self.steps_logged()
        self._before = min(self._before, now)
        return now - self._before

    def _wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + 600
        while True:
            over = self.process.poll() is not None  # first: it may end between the two
            if found := condition():
                return found
            assert not over, f"ended before {what}: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"no {what} in time"
            time.sleep(0.01)

    def pid(self, rank: int) -> int:
        """Process of a rank, from its heartbeat."""
        beat = self.folder / "logs" / "heartbeats" / f"rank_{rank:05d}.json"
        text = self._wait_for(lambda: beat.exists() and beat.read_text(), "a heartbeat")
        return json.loads(text)["pid"]

    def end(self) -> Ended:
        """Wait for the command to end by itself."""
        began = time.monotonic()
        text = "".join(self.process.communicate(timeout=600))
        seconds = time.monotonic() - began
        file = self.folder / "failure.json"
        logs = sorted((self.folder / "logs").glob("rank_*.log"))
        return Ended(
            code=self.process.wait(),
            text=text,
            failure=json.loads(file.read_text()) if file.exists() else None,
            logged=self.steps_logged(),
            seconds=seconds,
            left_running=self.processes(),
            logs="\n".join(log.read_text(errors="replace") for log in logs),
            kept=sorted(path.name for path in (self.folder / "checkpoints").iterdir()),
        )

    def processes(self) -> list[str]:
        """Command lines of the processes of the run."""
        time.sleep(1.0)  # an engine looks for its parent twice a second
        found = []
        for entry in Path("/proc").iterdir():
            try:
                marked = self._mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                marked |= warm_commands.has_open(entry, self.folder)
                if marked and ") Z " not in (entry / "stat").read_text():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITE + hold.SITE)
    return folder


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path]:
    """A file system of 64 MiB, for root; another user gets a folder, and no full disk."""
    folder = tmp_path_factory.mktemp("disk")
    with nullcontext() if why_not("mount") else small_file_system(folder, "64m"):
        yield folder


class Story:
    """The faults, one start of the command for each, in the order they are asked for first."""

    def __init__(self, config: Path, site: Path, disk: Path):
        self.run = Command(config, disk / "run", site)
        self.disk = disk
        self._ended: dict[str, Ended] = {}
        self._faults: dict[str, Callable[[], None]] = {
            "full disk": lambda: _fill(disk),
            "stopped rank": lambda: os.kill(self.run.pid(1), signal.SIGSTOP),
            "killed rank": lambda: os.kill(self.run.pid(1), signal.SIGKILL),
            "time limit": lambda: self.run.process.send_signal(signal.SIGUSR1),
        }

    @property
    def folder(self) -> Path:
        return self.run.folder

    def after(self, fault: str) -> Ended:
        """What a fault did; it happens now if it has not happened yet."""
        if fault not in self._ended:
            # Only where something is to stand still: a busy machine is slow everywhere else too.
            overrides = [STANDS_STILL] if fault == "stopped rank" else []
            held = Hold(self.run.site / "hold", step=3)  # a checkpoint further
            # Whose rank is killed, has an engine that looks for its parent.
            fresh = fault == "killed rank"
            self.run.start(*overrides, fresh=fresh, **{HELD: held.environment[HELD]})
            self.run.wait_for_steps(3)
            self._faults[fault]()
            held.release()
            self._ended[fault] = self.run.end()
            (self.disk / "ballast").unlink(missing_ok=True)
        return self._ended[fault]

    def end(self) -> Ended:
        """The last start, from a damaged newest checkpoint, with a clock that jumps."""
        if "end" not in self._ended:
            self.after("time limit")
            newest = max((self.folder / "checkpoints").glob("step_??????"))
            _flip_a_byte(max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size))
            self.run.start(TEST_CLOCK="1")
            self.run.wait_for_steps(1)
            self._ended["end"] = self.run.end()
        return self._ended["end"]

    def note(self, fault: str, name: str, how: str, seen: str, lost: str = REPEATED) -> None:
        """Keep a row for the table; ``back`` is known once the next start has come far enough."""
        ended, number = self._ended[name], list(self._ended).index(name)
        back = self.run.back[number + 1] if number + 1 < len(self.run.back) else None
        record(
            fault,
            how=how,
            seen=f"exit {ended.code}: {seen}",
            stops=round(ended.seconds, 1),
            back=back and round(back, 1),
            lost=lost,
        )


@pytest.fixture(scope="module")
def story(calm, site, small_disk) -> Story:
    return Story(calm.unevaluated, site, small_disk)


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _failure(ended: Ended) -> dict[str, Any]:
    """failure.json of a start that a restart may cure; shown to the user, no process left."""
    assert ended.code == 75, ended.text
    assert ended.left_running == []
    assert ended.failure is not None, ended.text
    assert ended.failure["exit_code"] == 75
    assert ended.failure["message"] in ended.text
    return ended.failure


@pytest.mark.needs("mount")
def test_a_full_disk_ends_the_run_and_loses_nothing_complete(story):
    ended = story.after("full disk")
    assert ended.code == 75, ended.text
    assert ended.left_running == []
    assert "No space left on device" in ended.text


def test_a_rank_that_stands_still_is_named_by_its_peers(story):
    failure = _failure(story.after("stopped rank"))
    assert (failure["kind"], failure["rank"]) == ("hung", 1)
    assert "Stopped or gone: rank 1 " in failure["message"]
    assert "run.timeout_minutes = 0.4" in failure["message"]


def test_a_killed_rank_is_the_reason_not_the_peer_it_left(story):
    failure = _failure(story.after("killed rank"))
    assert (failure["kind"], failure["rank"]) == ("killed", 1)
    assert "signal 9 (SIGKILL)" in failure["message"]


def test_the_time_limit_signal_saves_and_says_so(story):
    ended = story.after("time limit")
    assert ended.code == 138, ended.text
    assert ended.failure is None and "the same command resumes" in ended.text
    assert f"step_{ended.logged:06d}" in ended.kept
    assert not any(name.startswith(".") for name in ended.kept)
    assert ended.left_running == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(story):
    ended = story.end()
    assert ended.code == 0, ended.text
    assert "other contents than were written (sha256)" in ended.text
    assert "Resuming from step" in ended.text


def test_the_clock_may_jump(story):
    story.end()
    seconds = json.loads((story.folder / "summary.json").read_text())["seconds"]
    assert 0 < seconds < 3600
    for line in (story.folder / "metrics.jsonl").read_text().splitlines():
        assert 0 < json.loads(line)["seconds_total"] < 600


def test_all_faults_together_change_no_bit(story, calm):
    """The run that met them all equals one that met none."""
    assert story.end().failure is None
    assert_same(story.folder, calm, "metrics.jsonl")
    _write_rows(story)


def _write_rows(story: Story) -> None:
    """For docs/reliability.md, now that the comparison has shown what was lost: time only."""
    if os.path.ismount(story.disk):
        story.note(
            *("file system full", "full disk", "a file system of 64 MiB filled to the last byte"),
            "which file could not be written, and that there is no space",
        )
    story.note(
        *("a rank stands still, or its collective hangs", "stopped rank"),
        *("SIGSTOP to rank 1, run.timeout_minutes = 0.4", "which rank, in which step and phase"),
    )
    story.note(
        *("a rank dies", "killed rank", "SIGKILL to rank 1", "rank, signal, step and phase"),
    )
    story.note(
        *("a job's time is up", "time limit", "SIGUSR1 to the launcher", "stopped; resumes"),
        lost="nothing",
    )
    record(
        "newest checkpoint damaged",
        how="one byte flipped in a file of tensors",
        seen="a warning that names the file; the run goes on from the checkpoint before",
        stops=None,
        back=round(story.run.back[-1], 1),
        lost="the steps between the two checkpoints are repeated",
    )
    record(
        "wall clock jumps",
        how="time.time off by a year, back and forth, in every process",
        seen="nothing; durations in metrics and summary are right",
        stops=None,
        back=None,
        lost="nothing",
    )
