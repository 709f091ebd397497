"""A run that is broken on purpose: wait for a step, break something, see what comes back.

:class:`SlurmRun` is submitted to the test cluster, :class:`LocalRun` is started on this machine and
started again whenever it ends. What is measured of a fault: seconds until the run stops, seconds
until it is beyond the step it had reached, and how many steps it did again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.testcluster.cluster import Cluster, is_alive, processes_with, variables_of

REPOSITORY = Path(__file__).resolve().parents[2]
ARITHMETIC = REPOSITORY / "examples" / "arithmetic"
TROPD = [sys.executable, "-m", "megatron_tropd.cli"]
TIMINGS = ("seconds_", "tokens_per_second", "peak_memory")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
LONG = 500.0
"""Seconds nothing takes on two cores, even where others use them too."""
SMALL = {
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 16},
    "train": {"warmup_steps": 0},
    "run": {
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "trajectories_every": 0,
        "tensorboard": False,
        "timeout_minutes": 3,
    },
}
"""What makes the arithmetic job one with little to do in each step."""
WARNING_SECONDS = 240
"""Slurm looks at time limits, in whole minutes, twice a minute."""
ROLES = {
    "rank": "megatron_tropd.launch.rank",
    "engine": "megatron_tropd.rollout.engines.child",
    "launcher": "distill",
    "server": "serve",
}
"""Kinds of processes and the word of the command line that tells them."""


@dataclass(frozen=True)
class Recovery:
    """What a fault cost."""

    stops: float | None
    """Seconds from the fault until the run has stopped; None: it went on."""
    back: float
    """Seconds from there (or from the fault) to the first step beyond those done before."""
    lost: int
    """Steps done again."""
    failure: dict[str, Any]
    """What ``failure.json`` said in between; empty: nothing."""


class _Run(ABC):
    """A run folder and whoever works on it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        """Make the folder and a config in it.

        Args:
            folder: of the run.
            overrides: ``section.key=value`` beside :data:`SMALL`.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = write_small_config(folder / "small.toml")
        self.overrides = (*overrides, f"run.dir={folder}")

    def step(self) -> int:
        """The newest step in the metrics; 0 before the first."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def failure(self) -> dict[str, Any]:
        """Why the run last failed, if it did."""
        try:
            return json.loads((self.folder / "failure.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def reach(self, step: int) -> None:
        """Wait for a step."""
        self.wait_for(lambda: self.step() >= step, f"step {step}")

    def wait_for(
        self,
        condition: Callable[[], Any],
        what: str,
        *,
        seconds: float = LONG,
        may_end: bool = False,
    ) -> Any:
        """Poll until ``condition()``; if the run ends before, fail with everything it said."""
        start = looked = time.monotonic()
        while not (found := condition()):
            now = time.monotonic()
            if now > looked + 1 and not may_end:
                looked = now
                assert not self.is_over() or condition(), f"Over before {what}. {self.story()}"
            assert now < start + seconds, f"No {what} in {seconds:.0f} s. {self.story()}"
            time.sleep(0.02)
        return found

    def signal(
        self, role: str, node: str | None = None, number: int = signal.SIGKILL, *, which: int = 0
    ) -> None:
        """Send a signal to one of the processes of a role, once there is one."""
        found = self.wait_for(lambda: self.processes(role, node), f"{role} on {node or 'a node'}")
        os.kill(found[which % len(found)], number)

    def processes(self, role: str, node: str | None = None) -> list[int]:
        """Process ids of one of :data:`ROLES`, of one node if given, ascending."""
        found = []
        for pid in self.all_processes(node):
            words = _command(pid)
            if ROLES[role] in words and "python" in os.path.basename(words[0]):
                found.append(pid)
        return sorted(found)

    @abstractmethod
    def all_processes(self, node: str | None = None) -> list[int]:
        """Every living process of the run."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether nobody works on the run any more."""

    def story(self) -> str:
        """Everything that helps to understand a failed test."""
        parts = [f"failure.json: {self.failure()}"]
        for path in sorted(self.folder.rglob("*.log"), key=lambda path: path.stat().st_mtime):
            text = path.read_text(errors="replace")[-3000:]
            parts.append(f"--- {path.relative_to(self.folder)}\n{text}")
        return "\n".join(parts)


class LocalRun(_Run):
    """On this machine, without Slurm."""

    _process: subprocess.Popen | None = None

    def start(self, *, niceness: int = 0) -> None:
        """Start the command; with a niceness it takes rather what others leave of the machine."""
        with (self.folder / "command.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["nice", f"-n{niceness}", *TROPD, "distill", str(self.config), *self.overrides],
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env=os.environ | self._mark(),
                start_new_session=True,
            )

    def wait(self) -> int:
        """Wait until the command has ended; its exit code, negative after a signal."""
        assert self._process is not None, "start() comes first"
        return self._process.wait()

    def complete(self) -> None:
        """Start the command and let it do the whole run."""
        self.start()
        assert self.wait() == 0, self.story()

    def recover(
        self, break_it: Callable[[], None], *, heal: Callable[[], None] = lambda: None
    ) -> Recovery:
        """Break something, wait for the end of the command, start it again."""
        start = time.monotonic()
        break_it()
        self.wait()
        stopped, top, failure = time.monotonic(), self.step(), self.failure()
        self.wait_for(lambda: not self.all_processes(), "the end of all", may_end=True)
        heal()
        self.start()
        low = top
        while self.step() <= top:
            low = min(low, self.step())
            assert not self.is_over() or self.step() > top, self.story()
            time.sleep(0.02)
        back = time.monotonic() - stopped
        return Recovery(round(stopped - start, 1), round(back, 1), top - low, failure)

    def all_processes(self, node: str | None = None) -> list[int]:
        """Every living process of the run."""
        return [pid for pid, _ in processes_with(self._mark())]

    def is_over(self) -> bool:
        """Whether the command has ended."""
        return self._process is not None and self._process.poll() is not None

    def kill(self) -> None:
        """End everything at once."""
        for pid in self.all_processes():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _mark(self) -> dict[str, str]:
        return {"TROPD_TESTRUN": str(self.folder)}


class SlurmRun(_Run):
    """A job of the test cluster."""

    def __init__(
        self, cluster: Cluster, folder: Path, *overrides: str, ranks_per_node: int = 1
    ) -> None:
        """Nothing is submitted yet; ``ranks_per_node``: of the site file."""
        super().__init__(folder, *overrides)
        self.cluster = cluster
        self.site = write_site(folder / "site.toml", ranks_per_node)
        self.job = ""

    def submit(self) -> None:
        """``tropd slurm --submit``."""
        done = subprocess.run(
            [
                *(*TROPD, "slurm", str(self.config), *self.overrides),
                *("--site", str(self.site), "--submit"),
            ],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=self.cluster.environment,
        )
        match = re.search(r"Submitted batch job (\d+)", done.stdout)
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

    def is_over(self) -> bool:
        """Whether Slurm is done with the job."""
        return bool(self.job) and self.state() in ENDED

    def ended(self) -> str:
        """Wait until the job is over; its state."""
        self.wait_for(self.is_over, "end", may_end=True)
        return self.state()

    def all_processes(self, node: str | None = None) -> list[int]:
        """Every living process of the run."""
        return self.cluster.job_processes(node)

    def recover(
        self,
        break_it: Callable[[], None],
        *,
        heal: Callable[[], None] = lambda: None,
        restart: bool = True,
    ) -> Recovery:
        """Break something, and wait until the run is beyond the steps done before.

        Args:
            break_it: what happens.
            heal: called once Slurm no longer runs the job (with ``restart``), or at once.
            restart: whether the job is to start anew.
        """
        before, start = self.restarts(), time.monotonic()
        top = low = self.step()
        stopped, failure = None, {}
        break_it()
        if not restart:
            heal()
        while True:
            about, step = self.about(), self.step()
            failure = self.failure() or failure
            # Restarts counts from the decision on; the attempt may still be saving (COMPLETING).
            requeued = int(about["Restarts"]) > before
            if restart and stopped is None and requeued and about["JobState"] == "PENDING":
                stopped, step = time.monotonic(), self.step()
                heal()
            if stopped or not restart:
                low = min(low, step)
                # A run that met it at its last step has nothing to go beyond.
                if step > top or (stopped and about["JobState"] == "COMPLETED"):
                    break
            else:
                top = low = max(top, step)
            assert time.monotonic() < start + LONG, f"No recovery. {self.story()}"
            assert about["JobState"] not in ENDED, f"It ended instead. {self.story()}"
            time.sleep(0.05)
        if restart:
            self.assert_nothing_old_runs()
        return Recovery(
            stops=round(stopped - start, 1) if stopped else None,
            back=round(time.monotonic() - (stopped or start), 1),
            lost=top - low,
            failure=failure,
        )

    def assert_nothing_old_runs(self) -> None:
        """No process of an earlier attempt is alive."""
        current, old = self.restarts(), []
        for pid in self.cluster.job_processes():
            variables = variables_of(pid)
            attempt = int(variables.get("SLURM_RESTART_COUNT", 0))
            if variables.get("SLURM_JOB_ID") == self.job and attempt != current:
                old.append((pid, attempt, " ".join(_command(pid))))
        assert not old, f"attempt {current} runs beside {old}"

    def assert_nothing_left(self) -> None:
        """No process of any job lives on; those that are ending get a moment."""
        deadline = time.monotonic() + 15
        while (left := self.cluster.job_processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left running: {[(pid, ' '.join(_command(pid))) for pid in left]}"

    def story(self) -> str:
        """Everything that helps to understand a failed test."""
        about = self.about() if self.job else "not submitted"
        return f"Job: {about}\n{super().story()}\n--- slurmctld\n{self.cluster.log()}"


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


def write_site(path: Path, ranks_per_node: int) -> Path:
    """What ``tropd slurm`` must know of the test cluster."""
    path.write_text(f"""
        partition = "main"
        account = ""
        time = "00:30:00"
        gpus_per_node = 0
        ranks_per_node = {ranks_per_node}
        exclusive = false
        memory = ""
        warning_seconds = {WARNING_SECONDS}
        venv = {json.dumps(sys.prefix)}
        [environment]
        PYTHONPATH = {json.dumps(str(REPOSITORY))}
    """)
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


def fill(file: Path) -> None:
    """Fill the file system that ``file`` lies on with it, to the last page."""
    with file.open("wb", buffering=0) as ballast:
        for size in (2**20, 2**12):
            try:
                while True:
                    ballast.write(b"\0" * size)
            except OSError:
                continue


def remount(disk: Path, mode: str) -> None:
    """Make a file system read-only (``ro``) or writable (``rw``)."""
    command = ["mount", "-o", f"remount,{mode}", str(disk)]
    deadline = time.monotonic() + 10
    while subprocess.run(command, capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(command)} fails.")
        time.sleep(0.05)  # busy while a checkpoint is written


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size at ``folder`` as root, for as long as the block lasts.

    Args:
        folder: made if absent.
        size: as ``mount`` takes it, for instance ``48m``.

    Raises:
        OSError: only root may do this, or not even root.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _command(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        text = ""
    return text.rstrip("\0").split("\0")
