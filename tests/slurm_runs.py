"""A run under the test cluster: submit it, wait for a step, break something, see what comes back.

What is measured of a fault: seconds until the run is beyond the step it had reached, and how many
steps it did again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.testcluster.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[1]
ARITHMETIC = REPOSITORY / "examples" / "arithmetic"
TROPD = [sys.executable, "-m", "megatron_tropd.cli"]
TIMINGS = ("seconds_", "tokens_per_second", "peak_memory")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
SMALL = {
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 32},
    "train": {"warmup_steps": 0},
    "run": {
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "trajectories_every": 0,
        "tensorboard": False,
        "timeout_minutes": 0.5,
    },
}
"""What makes the arithmetic job one with little to do in each step."""
ROLES = {
    "rank": "megatron_tropd.worker",
    "engine": "megatron_tropd.rollout.worker",
    "launcher": "distill",
    "server": "serve",
}
"""Kinds of processes and the word of the command line that tells them."""


@dataclass(frozen=True)
class Recovery:
    """What a fault cost."""

    seconds: float
    """From the fault to the first step beyond those done before it."""
    lost: int
    """Steps done again."""
    failure: dict[str, Any] | None
    """What ``failure.json`` said in between."""


class SlurmRun:
    """One run folder and the job that works on it."""

    def __init__(
        self, cluster: Cluster, folder: Path, *overrides: str, site: Path | None = None
    ) -> None:
        """Nothing is submitted yet.

        Args:
            cluster: up.
            folder: of the run.
            overrides: ``section.key=value`` beside :data:`SMALL`.
            site: file for ``tropd slurm``.
        """
        self.cluster, self.folder, self.site = cluster, folder, site
        folder.mkdir(parents=True)
        self.config = write_small_config(folder / "small.toml")
        self.overrides = (*overrides, f"run.dir={folder}")
        self.job = ""

    def local(self) -> None:
        """Do the run on this machine without Slurm."""
        command = [*TROPD, "distill", str(self.config), *self.overrides]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr

    def submit(self, *options: str) -> None:
        """``tropd slurm --submit``."""
        command = [*TROPD, "slurm", str(self.config), *self.overrides, *options, "--submit"]
        if self.site is not None:
            command += ["--site", str(self.site)]
        environment = self.cluster.environment
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=REPOSITORY, env=environment
        )
        match = re.search(r"[Ss]ubmitted.*?(\d+)", done.stdout)
        assert match, done.stdout + done.stderr
        self.job = match.group(1)

    def about(self) -> dict[str, str]:
        """What Slurm knows of the job: JobState, Restarts, Reason, ExitCode ..."""
        text = self.cluster.run("scontrol", "show", "job", "-o", self.job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self) -> str:
        """In Slurm's words."""
        return self.about()["JobState"]

    def restarts(self) -> int:
        """How often the job was requeued."""
        return int(self.about()["Restarts"])

    def step(self) -> int:
        """The newest step in the metrics; 0 before the first."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def failure(self) -> dict[str, Any] | None:
        """Why the run last failed, if it did."""
        try:
            return json.loads((self.folder / "failure.json").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def reach(self, step: int, seconds: float = 180) -> None:
        """Wait for a step."""
        self.wait_for(lambda: self.step() >= step, f"step {step}", seconds=seconds)

    def ended(self, seconds: float = 180) -> str:
        """Wait until the job is over; its state."""
        self.wait_for(lambda: self.state() in ENDED, "the end", seconds=seconds, may_end=True)
        return self.state()

    def wait_for(
        self,
        condition: Callable[[], Any],
        what: str,
        *,
        seconds: float = 120,
        may_end: bool = False,
        every: float = 0.02,
    ) -> Any:
        """Poll until ``condition()``; fail with everything the job said if it ends before."""
        deadline, looked = time.monotonic() + seconds, time.monotonic()
        while not (found := condition()):
            if time.monotonic() > looked + 1 and not may_end:
                looked = time.monotonic()
                state = self.state()
                assert state not in ENDED or condition(), f"{state} before {what}. {self.story()}"
            assert time.monotonic() < deadline, f"No {what} in {seconds:.0f} s. {self.story()}"
            time.sleep(every)
        return found

    def processes(self, role: str, node: str | None = None) -> list[int]:
        """Process ids of one of :data:`ROLES`, of one node if given, ascending."""
        found = []
        for pid in self.cluster.job_processes(node):
            words = _command(pid)
            if ROLES[role] in words and "python" in os.path.basename(words[0]):
                found.append(pid)
        return sorted(found)

    def signal(self, role: str, node: str | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to the first process of a role."""
        found = self.processes(role, node)
        assert found, f"no {role} on {node or 'any node'}. {self.story()}"
        os.kill(found[0], number)

    def recover(
        self,
        break_it: Callable[[], None],
        *,
        at: int,
        heal: Callable[[], None] = lambda: None,
        restart: bool = True,
        seconds: float = 180,
    ) -> Recovery:
        """Break something once a step is done, and wait until the run is beyond it again.

        Args:
            break_it: what happens.
            at: the step to wait for.
            heal: called once the job no longer runs (with ``restart``), or at once.
            restart: whether the job is to start anew.
            seconds: how long that may take.
        """
        self.reach(at)
        # A step may be under way: give it time to be counted as begun, not as done.
        before, start = self.restarts(), time.monotonic()
        top, low, failure, healed = self.step(), None, None, False
        break_it()
        while True:
            # Restarts first: metrics are cut only after the job has started anew.
            again, step = self.restarts() > before, self.step()
            failure = self.failure() or failure
            if again or not restart:
                low = step if low is None else min(low, step)
                if step > top:
                    break
            else:
                top = max(top, step)
            if not healed and (again or not restart or self.state() != "RUNNING"):
                heal()
                healed = True
            assert time.monotonic() < start + seconds, f"No recovery. {self.story()}"
            assert self.state() not in ENDED, f"It ended instead. {self.story()}"
            time.sleep(0.05)
        spent = time.monotonic() - start
        if restart:
            self.assert_nothing_old_runs()
        return Recovery(round(spent, 1), top - min(low, top), failure)

    def assert_nothing_old_runs(self) -> None:
        """No process of an earlier attempt is alive."""
        current = self.restarts()
        old = []
        for pid in self.cluster.job_processes():
            variables = _environment(pid)
            attempt = int(variables.get("SLURM_RESTART_COUNT", 0))
            if variables.get("SLURM_JOB_ID") == self.job and attempt != current:
                old.append((pid, attempt, " ".join(_command(pid))))
        assert not old, f"attempt {current} runs beside {old}"

    def story(self) -> str:
        """Everything that helps to understand a failed test."""
        parts = [f"Job: {self.about() if self.job else 'not submitted'}"]
        parts.append(f"failure.json: {self.failure()}")
        logs = sorted(self.folder.rglob("*.log"), key=lambda path: path.stat().st_mtime)
        logs += sorted(self.folder.rglob("*.out"))
        for path in logs:
            text = path.read_text(errors="replace")[-3000:]
            parts.append(f"--- {path.relative_to(self.folder)}\n{text}")
        return "\n".join(parts)


def write_small_config(path: Path) -> Path:
    """The arithmetic example with :data:`SMALL`, without its evaluations (engines of their own)."""
    tables = tomllib.loads((ARITHMETIC / "tropd.toml").read_text())
    del tables["evaluation"]
    tables["model"] = {who: str(ARITHMETIC / who) for who in ("student", "teacher")}
    for section, key in (("rollout", "prompts"), ("guidance", "responses")):
        tables[section][key] = str(ARITHMETIC / tables[section][key])
    for section, values in SMALL.items():
        tables[section] |= values
    # JSON's strings, numbers, lists and booleans are TOML's.
    path.write_text(
        "".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in table.items())
            for name, table in tables.items()
        )
    )
    return path


def records(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics without what no two runs share."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)}
        for line in path.read_text().splitlines()
    ]


def assert_same_run(folder: Path, yardstick: Path) -> None:
    """The metrics and the trained student agree bit for bit."""
    assert records(folder / "metrics.jsonl") == records(yardstick / "metrics.jsonl")
    ours, theirs = (f / "student_hf" / "model.safetensors" for f in (folder, yardstick))
    assert ours.read_bytes() == theirs.read_bytes()


def assert_close_run(folder: Path, yardstick: Path, tolerance: float) -> None:
    """Every number of the metrics agrees to ``tolerance``, absolute or relative."""
    ours, theirs = (records(f / "metrics.jsonl") for f in (folder, yardstick))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                gap = abs(one[name] - value)
                assert gap <= tolerance * max(1, abs(value)), (one["step"], name, one[name], value)


def assert_nothing_left(cluster: Cluster, seconds: float = 15) -> None:
    """No job process lives on (those that are ending get a moment)."""
    deadline = time.monotonic() + seconds
    while (left := cluster.job_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left running: {_shown(left)}"


def _shown(pids: Sequence[int]) -> Iterable[str]:
    return [f"{pid}: {' '.join(_command(pid))}" for pid in pids]


def _command(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        text = ""
    return text.rstrip("\0").split("\0")


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        text = ""
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
