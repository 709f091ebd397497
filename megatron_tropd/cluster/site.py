"""The site file: everything a job script has to know of one cluster and cannot know of a run."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.text_files import read_toml
from megatron_tropd.config import settings_from_table
from megatron_tropd.config.settings import Count, Number, Settings

_PLACES = re.compile(r"--(array|nodes|ntasks)\b|-[aNn]")
_OURS_OF_SRUN = re.compile(r"--(container-(image|mounts|workdir|env)|output|open-mode|export)\b")
_SECRET = re.compile("(^|_)(TOKEN|SECRET|PASSWORD|API_KEY)(_|$)", re.IGNORECASE)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Container(Settings, section="container"):
    """An image that pyxis starts on every node (``srun --container-image``)."""

    image: str
    """Path of a squashfs file, or a registry's name. ``tropd`` is on its PATH."""
    mounts: tuple[str, ...] = ()
    """SOURCE[:TARGET[:FLAGS]]; models, prompts, run folder and the folder that the job is
    submitted from must be seen in it, under the same paths."""


@dataclass(frozen=True, kw_only=True)
class Site(Settings):
    """One cluster and one way to use it."""

    partition: str
    """Slurm's partition; "" leaves the cluster's default."""
    account: str
    """Who is charged; "" leaves the user's default."""
    time: str
    """Longest time of one job (HH:MM:SS, D-HH:MM:SS, minutes); the run goes on in the next."""
    gpus_per_node: Number
    """GPUs of one node, each the device of one rank; 0: no GPUs."""
    ranks_per_node: Count | None = None
    """Ranks of one node if it has no GPUs."""
    gres: str = "gpu"
    """What GPUs are asked for by: NAME or NAME:TYPE of --gres; "": not asked for."""
    cpus_per_node: Count | None = None
    """CPUs to ask for on a node; None: all of them if exclusive, else Slurm's default."""
    memory: str = "0"
    """Memory to ask for on a node (--mem); 0: all of it; "": Slurm's default."""
    exclusive: bool = True
    """Whether nodes are shared with nobody."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features the nodes must have."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as on its command line, without numbers of nodes and tasks."""
    srun_options: tuple[str, ...] = ()
    """Further options of srun for every step: --mpi=none, pyxis' --no-container-mount-home ..."""
    warning_seconds: Count = 600
    """The run is told to save so long before its time is up: one step, with its evaluation and
    checkpoint if they are due, must fit."""
    max_restarts: Number = 3
    """Requeues in a row without a finished step, after which the job gives up."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Further lines of shell before anything is started."""
    venv: str | None = None
    """Virtual environment with megatron_tropd, on a file system all nodes share; absolute."""
    container: Container | None = None
    """Container with megatron_tropd instead."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process, such as GLOO_SOCKET_IFNAME; ``$`` in a value means nothing
    (``setup`` is shell). No secrets: the job file is kept."""

    def _check_together(self) -> None:
        _require(
            self.gpus_per_node > 0 or (self.ranks_per_node or 0) > 0,
            "gpus_per_node = 0 needs ranks_per_node: how many ranks a node without GPUs gets.",
        )
        _require(
            self.gpus_per_node == 0 or self.ranks_per_node is None,
            "ranks_per_node is for nodes without GPUs (gpus_per_node = 0): a GPU is one rank's.",
        )
        _require(
            self.venv is None or self.container is None,
            "Give venv or container, not both: one place where megatron_tropd is installed.",
        )
        _require(
            self.venv is None or self.venv.startswith("/"),
            f"venv must be an absolute path, without ~ and the same on every node: {self.venv!r}.",
        )
        for key, command in (("options", "sbatch"), ("srun_options", "srun")):
            for option in getattr(self, key):
                _require(
                    option.startswith("-") and not _PLACES.match(option),
                    f"{key}: {option!r} must be an option of {command} that places nothing: "
                    "nodes and tasks follow from the config, and one run is one job, no array. "
                    "Remove it.",
                )
        for option in self.srun_options:
            _require(
                not _OURS_OF_SRUN.match(option),
                f"srun_options: {option!r} is written by tropd slurm itself, from [container], "
                "[environment] and the run. Remove it.",
            )
        limit = _seconds(self.time)
        _require(
            0 < self.warning_seconds < min(limit, 65536),
            f"warning_seconds = {self.warning_seconds} must be above 0 and below time = "
            f"{self.time!r} ({limit} s) and 65536 (Slurm's limit).",
        )
        for name, value in self.environment.items():
            _require(
                re.fullmatch(r"[A-Za-z_]\w*", name) is not None,
                f"environment.{name} must be a variable's name with a string, found {value!r}.",
            )
            _require(
                not _SECRET.search(name),
                f"environment.{name} looks like a secret, and the job file is kept in the run "
                "folder. Export it in the shell you submit from: the job inherits it.",
            )

    @property
    def slots_per_node(self) -> int:
        """Ranks of one node."""
        return self.gpus_per_node or self.ranks_per_node or 0


def load_site(path: str | Path) -> Site:
    """Read a site file.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown or missing, a value has the
            wrong type or does not fit.
    """
    path = Path(path)
    copy = "Copy slurm/site.example.toml and fill it in."
    table = read_toml(path, "Site file", otherwise=copy)
    try:
        return settings_from_table(Site, table)
    except ConfigError as error:
        raise ConfigError(f"Site file {path}: {error}") from None


def _seconds(time: str) -> int:
    """Slurm's forms: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise ConfigError(
            f"time must look like 04:00:00, 1-12:00:00 or 240 (minutes), found {time!r}."
        )
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None or found[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second
