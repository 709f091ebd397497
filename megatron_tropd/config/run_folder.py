"""A run is a folder: where each thing lies, and whether a command may continue what is there."""

import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_tropd.base.environment import variable
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import write_json
from megatron_tropd.config import (
    Config,
    NamedTeacher,
    TaskConfig,
    config_from_dict,
    config_to_dict,
    default_settings,
    is_run_settings,
    read_settings,
)
from megatron_tropd.config.megatron_fields import Table, may_change

FREE_SECTIONS = ("run", "parallel")
"""Sections that may change when a run resumes: they alter no number but timings and round-off."""
FIXED_KEYS = ("parallel.distributed_optimizer",)
"""Exceptions: the two kinds of optimizer save their states in different forms."""
FREE_KEYS = (
    *("rollout.weight_transport", "rollout.engine_gpu_share", "rollout.engine_cpu_kv_gib"),
    *("rollout.max_num_seqs", "rollout.max_num_batched_tokens", "evaluation.teacher"),
    *("evaluation.keep_answers", "evaluation.teacher_results"),
    *("teacher.offload", "teacher.address", "teacher.served_model", "teacher.requests"),
    *("teacher.timeout_seconds", "teacher.parallel"),
)
"""Further keys that alter no number of the student but round-off."""
LOCK_SECONDS = 180.0
"""How long a job that Slurm starts again waits for the lock of its earlier attempt."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """Resolved settings, JSON."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON object per evaluation."""
        return self.root / "evaluations.jsonl"

    @property
    def answers(self) -> Path:
        """All answers of each evaluation, with their verdicts."""
        return self.root / "evaluations"

    @property
    def trajectories(self) -> Path:
        """Example trajectories with per-token values."""
        return self.root / "trajectories"

    @property
    def checkpoints(self) -> Path:
        """Megatron checkpoints."""
        return self.root / "checkpoints"

    @property
    def student(self) -> Path:
        """HF export of the trained student."""
        return self.root / "student_hf"

    @property
    def adapter(self) -> Path:
        """The trained adapters alone, as PEFT loads them; if the student has any."""
        return self.root / "student_adapter"

    @property
    def logs(self) -> Path:
        """What ranks and engines printed."""
        return self.root / "logs"

    @property
    def heartbeats(self) -> Path:
        """Where each rank is, while the run lasts."""
        return self.logs / "heartbeats"

    @property
    def failure(self) -> Path:
        """Why the run ended; only after a failure."""
        return self.root / "failure.json"

    @property
    def initial_hf(self) -> Path:
        """HF folders of a pair given as Megatron checkpoints, for the engines."""
        return self.root / "initial_hf"

    @property
    def servers(self) -> Path:
        """Where the rollout servers of the run can be reached, one file each."""
        return self.root / "servers"

    @property
    def weights(self) -> Path:
        """Versions of the student's weights on their way to the rollout servers."""
        return self.root / "weights"

    @property
    def summary(self) -> Path:
        """The result; exists only when the run is complete."""
        return self.root / "summary.json"

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a complete run, else None."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def read_config(self) -> Config:
        """The settings the run was started with."""
        if not self.config.exists():
            raise InputError(
                f"{self.root} is not a run folder: {self.config} is missing. Give the folder that "
                "`tropd distill` wrote (run.dir)."
            )
        return config_from_dict(read_settings(self.config))


def with_date(config: Config) -> Config:
    """Give the prompts of a run their date: that of its first start, which its folder remembers.

    Args:
        config: of any command that reads the run's prompts.

    Returns:
        ``config`` with ``rollout.chat_template_date``: as set, else the run's, else today.
    """
    if config.rollout.chat_template_date is not None:
        return config
    old = _settings_in(RunFolder(Path(config.run.dir).resolve()).config)
    date = old["rollout"].get("chat_template_date") if is_run_settings(old) else None
    rollout = dataclasses.replace(
        config.rollout, chat_template_date=date or datetime.date.today().isoformat()
    )
    return dataclasses.replace(config, rollout=rollout)


def run_of(path: Path) -> RunFolder | None:
    """The run that a folder is, or whose exported student it is; None: neither."""
    for root in (path, path.absolute().parent):
        run = RunFolder(root)
        if is_run_settings(_settings_in(run.config)):
            same = root == path or (run.student.exists() and path.samefile(run.student))
            return run if same else None
    return None


def check_run(config: Config) -> None:
    """Check that this command may continue what is in the run folder, if there is anything.

    Raises:
        ConfigError: the folder holds a run with other settings, which are named, or is no run's.
    """
    folder = RunFolder(Path(config.run.dir).resolve())
    if folder.config.exists():
        _check_same(read_settings(folder.config), config_to_dict(with_date(config)), folder.root)


def open_run(config: Config) -> RunFolder:
    """Make the run folder, or check that this command may continue what is in it.

    Raises:
        ConfigError: as :func:`check_run`.
    """
    folder, config = RunFolder(Path(config.run.dir).resolve()), with_date(config)
    check_run(config)
    folder.logs.mkdir(parents=True, exist_ok=True)
    folder.failure.unlink(missing_ok=True)
    # A rank that dies before its first heartbeat must not be described by one of an earlier start.
    shutil.rmtree(folder.heartbeats, ignore_errors=True)
    write_json(folder.config, config_to_dict(config))
    return folder


def wait_until_open(config: Config, seconds: float = 180.0) -> RunFolder:
    """The run folder, once another process (of another node) has opened it for ``config``.

    A client of NFS may believe for a minute that a file is not there or still the old one.

    Raises:
        ConfigError: it did not appear here: the nodes do not share the file system.
    """
    folder = RunFolder(Path(config.run.dir).resolve())
    # A run that resumes with another layout has the old settings there until it is opened.
    deadline = time.monotonic() + seconds
    # The date is the other process's, on whose clock it may be another day.
    while _settings_in(folder.config) != config_to_dict(with_date(config)):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{folder.config} was opened by another process and did not appear on "
                f"{socket.gethostname()} within {seconds:.0f} s. Put run.dir on a file system "
                "that all nodes share, and give every node the same settings."
            )
        time.sleep(0.1)
    return folder


def _settings_in(path: Path) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def patience() -> float:
    """Seconds that this command waits for a lock: a job that starts again may meet its own.

    A file server may still hold that of a machine that died.
    """
    again = variable("SLURM_RESTART_COUNT") is not None
    again |= (variable("TORCHELASTIC_RESTART_COUNT") or "0") != "0"
    return LOCK_SECONDS if again else 0.0


@contextmanager
def hold(root: Path, patience: float = 0.0) -> Iterator[None]:
    """Keep a run folder to this command for as long as the block lasts, however it ends.

    Args:
        root: the run folder.
        patience: seconds to wait for another command.

    Raises:
        ConfigError: another command is running in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (root / ".lock").open("w") as lock:
        while not _locked(lock):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"Another command is running in {root}. Wait for it, stop it, or give another "
                    "run.dir."
                )
            time.sleep(0.2)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Lustre, for one, has no locks unless it is mounted with them.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(
            f"tropd: warning: {lock.name} cannot be locked ({error.strerror}): nothing keeps a "
            "second command out of this folder. Start only one.",
            file=sys.stderr,
        )
    return True


def started_at() -> float:
    """When the user's command began, on the clock of ``time.monotonic``.

    The launcher sets it for its ranks: processes of one machine share that clock, and nobody sets
    it.
    """
    os.environ["TROPD_STARTED"] = started = variable("TROPD_STARTED") or repr(time.monotonic())
    return float(started)


def _check_same(old: dict[str, Any], new: dict[str, Any], root: Path) -> None:
    # A version without a setting did what its default says, and knew no date.
    defaults = default_settings()
    defaults["rollout"]["chat_template_date"] = new["rollout"]["chat_template_date"]
    was, now = (
        dict(_flat({s: defaults[s] | some.get(s, {}) for s in defaults}))
        | dict(_of_several("teachers", NamedTeacher, some.get("teachers", [])))
        | dict(_of_several("tasks", TaskConfig, some.get("tasks", [])))
        for some in (old, new)
    )
    changed = [
        f"{key}: was {was.get(key)!r}, now {now.get(key)!r}"
        for key in {
            **now,
            **{k: None for k in was if k.startswith(("megatron.", "teachers.", "tasks."))},
        }
        if was.get(key) != now.get(key) and not _is_free(key)
    ]
    if changed:
        raise ConfigError(
            f"{root} holds a run with other settings ({'; '.join(changed)}). Give the old settings "
            "to resume it, or another run.dir."
        )


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(section.key, value); an option of Megatron's is a key of its own, absent if not set."""
    for section, table in settings.items():
        for key, value in table.items():
            if section == "megatron":
                yield from ((f"megatron.{key}.{name}", option) for name, option in value.items())
            else:
                yield f"{section}.{key}", value


def _of_several(section: str, kind: Any, tables: Any) -> Iterator[tuple[str, Any]]:
    """(section.NAME.key, value) of each of several; what is not set as its default says."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else vars(f.default_factory())
        for f in dataclasses.fields(kind)
    }
    for table in tables:
        for key, value in {**defaults, **table}.items():
            plain = list(value) if isinstance(value, tuple) else value
            yield f"{section}.{table.get('name')}.{key}", plain


def _is_free(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "megatron":
        table, _, name = rest.partition(".")
        return may_change(cast(Table, table), name)
    if section == "teachers":
        key = f"teacher.{rest.partition('.')[2]}"
    return key in FREE_KEYS or (section in FREE_SECTIONS and key not in FIXED_KEYS)
