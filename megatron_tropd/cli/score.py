"""``tropd score``: the teacher's signals of recorded rollouts, for runs without a teacher."""

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from megatron_tropd.base import exits
from megatron_tropd.base.deterministic import set_environment
from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import exit_code, read
from megatron_tropd.base.files import write_json
from megatron_tropd.config import Config, NamedTeacher, TeacherConfig, config_to_dict, load_config
from megatron_tropd.config.hub import with_local_models
from megatron_tropd.config.run_folder import (
    RunFolder,
    hold,
    patience,
    started_at,
    wait_until_open,
    with_date,
)
from megatron_tropd.launch.launcher import Ranks
from megatron_tropd.launch.nodes import Peers, find_nodes
from megatron_tropd.launch.rank import leave, run_rank

JOB = "job"
"""Folder within the cache: settings, logs and the lock of the command that fills it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd score``."""
    parser.add_argument("config", type=Path, help='TOML file with teacher.placement = "cached"')
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--teacher", metavar="NAME", help="which, if several of them are cached")


def run(arguments: argparse.Namespace) -> int:
    """Write what is missing in ``teacher.cache``; on several nodes this node's share."""
    from megatron_tropd.cli.distill import is_rank

    started_at()
    config = load_config(arguments.config, arguments.overrides)
    config = with_local_models(job_config(config, arguments.teacher))
    set_environment(config.run.deterministic)
    if is_rank():
        return _be_rank(config)
    nodes = find_nodes()
    with Ranks(config, nodes) as ranks:
        ranks.start()  # they import while we prepare
        with Peers(nodes) as peers:
            code = exit_code(lambda: _share(config, ranks, peers))
            peers.end(code)
            peers.let_node_0_end()
            return code


def job_config(config: Config, name: str | None = None) -> Config:
    """The settings of a run with a cached teacher as those of the command that scores.

    Args:
        name: of one of several.

    Raises:
        ConfigError: the run's teacher is not cached, or it is not clear which one is meant.
    """
    cached, alone = _cached(config, name)
    config = with_date(config)
    folder = str(Path(str(alone.teacher.cache)).resolve() / JOB)
    return replace(
        config,
        teachers=tuple(replace(teacher, placement=_scored_by(teacher)) for teacher in cached),
        teacher=replace(config.teacher, placement=_scored_by(config.teacher)),
        # No engine is started, here or by the launcher.
        rollout=replace(config.rollout, placement="separate"),
        run=replace(config.run, dir=folder),
    )


def _cached(config: Config, name: str | None) -> tuple[list[NamedTeacher], Config]:
    """The one of several teachers that is meant, if there are several, and the run of it alone."""
    if not config.teachers:
        if name is not None:
            raise ConfigError(f"--teacher {name}: the config has no [[teachers]]. Leave it out.")
        if config.teacher.placement != "cached":
            raise ConfigError(
                "`tropd score` fills teacher.cache for a run that reads it, found "
                f"teacher.placement = {config.teacher.placement!r}. Set teacher.placement = "
                '"cached" and teacher.cache.'
            )
        return [], config
    of_name = dict(zip((t.name for t in config.teachers), config.by_teacher.values(), strict=True))
    cached = [teacher for teacher in config.teachers if teacher.placement == "cached"]
    meant = [teacher for teacher in cached if name in (None, teacher.name)]
    if len(meant) != 1:
        raise ConfigError(
            "`tropd score` scores with one teacher, a cached one: expected --teacher with one of "
            f"{', '.join(t.name for t in cached) or 'none (no teacher is cached)'}, found {name}."
        )
    return meant, of_name[meant[0].name]


def _scored_by(teacher: TeacherConfig) -> str:
    """Placement of a cached teacher while it scores."""
    return "served" if teacher.address else "resident"


def _share(config: Config, ranks: Ranks, peers: Peers) -> int:
    if peers.nodes.rank:
        message = peers.receive()
        if "start" not in message:
            return int(message["end"])
        return ranks.run(wait_until_open(config), peers, port=message["start"], job="score")
    with hold(Path(config.run.dir), patience()):
        folder = _opened(config)
        peers.gather()
        peers.send({"start": ranks.port})
        code = ranks.run(folder, peers, port=ranks.port, job="score")
        return _said(config, folder, code)


def _opened(config: Config) -> RunFolder:
    """Make the command's folder afresh; the shards beside it stay."""
    folder = RunFolder(Path(config.run.dir))
    folder.logs.mkdir(parents=True, exist_ok=True)
    for left in (folder.failure, folder.summary):
        left.unlink(missing_ok=True)
    shutil.rmtree(folder.heartbeats, ignore_errors=True)
    write_json(folder.config, config_to_dict(config))
    return folder


def _said(config: Config, folder: RunFolder, code: int) -> int:
    """Tell how it ended; the exit code."""
    summary = folder.read_summary()
    failure = read(folder.failure)
    if summary is None and failure is not None:
        print(f"tropd: {failure.message}\nLogs: {folder.logs}", file=sys.stderr)
        return failure.exit_code
    if summary is None:
        print("tropd: stopped; the same command goes on where it was.", file=sys.stderr)
        return code or exits.RESTART
    (alone,) = config.by_teacher.values()
    each = summary["bytes"] / max(summary["tokens"], 1)
    print(json.dumps(summary))
    print(
        f"{summary['sequences']} sequences with {summary['tokens']} scored tokens in "
        f"{alone.teacher.cache}: {summary['bytes'] / 1e6:.1f} MB, {each:.0f} bytes a token "
        f"(k = {summary['top_k']}, {summary['dtype']})"
    )
    return exits.COMPLETE


def _be_rank(config: Config) -> int:
    """torchrun started us: this process is a rank; rank 0 locks and opens the folder."""
    from megatron_tropd.cli.distill import check_world_size

    check_world_size(config)
    is_first = number("RANK") == 0
    with hold(Path(config.run.dir), patience()) if is_first else nullcontext():
        folder = _opened(config) if is_first else wait_until_open(config)
        leave(run_rank(folder, announce=True, job="score"))
