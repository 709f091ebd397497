"""``tropd distill``: train a student. Checks a run, starts its ranks, says how it ended."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.base import exits
from megatron_tropd.base.deterministic import set_environment
from megatron_tropd.base.environment import number, variable
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import SYMPTOMS, Failure, exit_code, read, report
from megatron_tropd.config import Config, ParallelConfig, config_to_dict, load_config
from megatron_tropd.config.hub import with_local_models
from megatron_tropd.config.run_folder import (
    RunFolder,
    check_run,
    hold,
    open_run,
    patience,
    started_at,
    wait_until_open,
    with_date,
)
from megatron_tropd.launch.launcher import Ranks
from megatron_tropd.launch.nodes import NodeLost, Nodes, Peers, find_nodes
from megatron_tropd.launch.rank import check_inputs, leave, run_rank

if TYPE_CHECKING:
    from megatron_tropd.distill.inputs import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd distill``."""
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the settings, stop"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; on several nodes this node's share."""
    started_at()
    config = with_local_models(load_config(arguments.config, arguments.overrides))
    if arguments.dry_run:
        config = with_date(config)
        check_run(config)
        inputs = check_inputs(config)
        print(json.dumps(config_to_dict(config), indent=2))
        print(_settings_text(config, inputs))
        return exits.COMPLETE
    # Whoever starts a process hands it on, before CUDA or an engine reads it.
    set_environment(config.run.deterministic)
    return _be_rank(config) if is_rank() else _start_ranks(config, find_nodes())


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or whoever started this process, made it a rank."""
    return all(variable(name, environment) for name in ("RANK", "WORLD_SIZE"))


def _start_ranks(config: Config, nodes: Nodes) -> int:
    """Start this node's ranks; node 0 prepares the run for all nodes."""
    with _noting_lost_nodes(config), Ranks(config, nodes) as ranks:
        if RunFolder(Path(config.run.dir)).read_summary() is None:
            ranks.start()  # they import while we prepare
        with Peers(nodes) as peers:
            code = exit_code(lambda: _share(config, ranks, peers))
            peers.end(code)
            peers.let_node_0_end()
            return code


def _share(config: Config, ranks: Ranks, peers: Peers) -> int:
    with _noting_lost_nodes(config):
        return (_follow if peers.nodes.rank else _lead)(config, ranks, peers)


@contextmanager
def _noting_lost_nodes(config: Config) -> Iterator[None]:
    """Leave the reason where a job looks: srun may show it the code of a node that it killed."""
    try:
        yield
    except NodeLost as error:
        failure = Failure(kind=error.kind, message=str(error))
        report(RunFolder(Path(config.run.dir)).failure, failure)
        raise


def _lead(config: Config, ranks: Ranks, peers: Peers) -> int:
    """Open the run folder for all nodes and see the run through."""
    config = with_date(config)
    # Errors of the inputs come before anything is written.
    if ranks.processes and (code := ranks.check(config)):
        return code
    with hold(Path(config.run.dir).resolve(), patience()):
        return _train(config, ranks, peers)


def _follow(config: Config, ranks: Ranks, peers: Peers) -> int:
    """Run this node's share once node 0 has opened the folder."""
    message = peers.receive()
    if "start" not in message:
        return int(message["end"])
    return ranks.run(wait_until_open(config), peers, port=message["start"])


def _train(config: Config, ranks: Ranks, peers: Peers) -> int:
    folder = open_run(config)
    summary = folder.read_summary()
    if summary is None:
        peers.gather()
        ranks.start()
        peers.send({"start": ranks.port})
        code = ranks.run(folder, peers, port=ranks.port)
        summary = folder.read_summary()
        # What breaks after the end is no failure; nor do ranks that are stopped at once and lose
        # each other. A job script that found it in the file would requeue.
        failure = read(folder.failure) if summary is None else None
        if failure and not (exits.is_stop(code) and failure.kind in SYMPTOMS):
            print(f"tropd: {failure.message}\nLogs: {folder.logs}", file=sys.stderr)
            return failure.exit_code
        folder.failure.unlink(missing_ok=True)
        if summary is None:
            code = code or exits.stopped_by(signal.SIGTERM)  # which somebody sent to a rank
            _say_stopped(code, folder.logs)
            return code
    from megatron_tropd.report.html import write_report
    from megatron_tropd.report.summary import summary_table

    page = write_report(folder.root)
    print(summary_table(summary or {}))
    print(f"Student (HF folder): {folder.student}\nReport:              {page}")
    return exits.COMPLETE


def _say_stopped(code: int, logs: Path) -> None:
    if exits.is_stop(code):
        print("tropd: stopped; the same command resumes.", file=sys.stderr)
    else:
        print(f"tropd: a rank ended with code {code}. Logs: {logs}", file=sys.stderr)


def check_world_size(config: Config) -> None:
    """See that torchrun started the ranks that the config asks for.

    Raises:
        ConfigError: it started another number.
    """
    world = number("WORLD_SIZE")
    if world != config.world_size:
        raise ConfigError(
            f"The launcher started {world} ranks, the config asks for {config.world_size} "
            f"({config.ranks_in_words}). Change parallel.*, teacher.ranks or the number of ranks."
        )


def _be_rank(config: Config) -> int:
    """Torchrun started us: this process is a rank; rank 0 locks and opens the folder."""
    check_world_size(config)
    is_first = number("RANK") == 0
    root = Path(config.run.dir).resolve()
    with hold(root, patience()) if is_first else nullcontext():
        return _as_rank(config, is_first=is_first)


def _as_rank(config: Config, *, is_first: bool) -> int:
    folder = open_run(config) if is_first else wait_until_open(config)
    if folder.read_summary():
        return exits.COMPLETE
    code = run_rank(folder, announce=True)
    if is_first and folder.read_summary():
        from megatron_tropd.report.html import write_report

        write_report(folder.root)
    leave(code)


def _settings_text(config: Config, inputs: "Inputs") -> str:
    from megatron_tropd.convert.families import describe

    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    guidance = f"{len(inputs.responses)} prompts have one" if inputs.responses else "off"
    return "\n".join(
        [
            f"ranks:      {config.parallel.world_size} ({_axes(config.parallel)})",
            *_teacher_on(config),
            *(f"{who + ':':<11} {describe(f.config)}" for who, f in inputs.folders.items()),
            *_left_unread(inputs),
            f"vocabulary: {inputs.vocab_size} shared columns, context {inputs.context} tokens",
            f"stop ids:   {', '.join(map(str, inputs.stop_token_ids))}",
            f"prompts:    {len(inputs.prompts)}, {config.rollout.prompts_per_step} a step x "
            f"{config.rollout.samples_per_prompt} samples = {samples} trajectories",
            f"teacher responses: {guidance}",
            *([f"golden answers: {len(inputs.golden)}, one a prompt"] if inputs.golden else []),
            f"held-out:   {_held_out(inputs)}",
            f"steps:      {config.train.steps}",
            *(f"option:     {line}" for line in config.megatron.lines()),
            f"run folder: {Path(config.run.dir).resolve()}",
            "dry run: nothing was written.",
        ]
    )


def _held_out(inputs: "Inputs") -> str:
    named = [
        f"{len(each.problems)} problems{f' of {each.name}' if each.name else ''}"
        + (f" x {each.settings.samples} samples" if each.settings.samples != 1 else "")
        for each in inputs.problem_sets
    ]
    return ", ".join(named) or "0 problems"


def _teacher_on(config: Config) -> list[str]:
    """A line for a teacher in a layout of its own."""
    axes, ranks = _axes(config.teacher_parallel), config.teacher.ranks
    if ranks is not None:
        return [f"teacher on: {ranks} ranks of its own ({axes})"]
    return [f"teacher on: {axes}"] if config.teacher.parallel else []


def _axes(p: ParallelConfig) -> str:
    shared = f", experts over {p.expert}" if p.expert > 1 else ""
    context = f" x CP {p.context}" if p.context > 1 else ""
    virtual = f" (VPP {p.virtual_pipeline})" if p.virtual_pipeline > 1 else ""
    return f"TP {p.tensor}{context} x PP {p.pipeline}{virtual} x DP {p.data}{shared}"


def _left_unread(inputs: "Inputs") -> list[str]:
    """A line for each model whose folder holds safetensors files that are not the model's."""
    from megatron_tropd.convert.hf_folder import HFFolder

    return [
        f"not read:   {', '.join(folder.unread)} ({who}: not files of its model)"
        for who, folder in inputs.folders.items()
        if isinstance(folder, HFFolder) and folder.unread
    ]
