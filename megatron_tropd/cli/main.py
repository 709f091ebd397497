"""The ``tropd`` command. Every subcommand imports what it needs when it runs."""

import argparse
import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.base import exits
from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.failures import KINDS, Failure, kind_of, report
from megatron_tropd.cli.convert import add_to_hf, add_to_megatron
from megatron_tropd.cli.slurm import add_slurm
from megatron_tropd.config import Config, config_to_dict, load_config
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch.first_rank import FirstRank
from megatron_tropd.launch.nodes import NodeLost, Nodes, Peers, find_nodes

if TYPE_CHECKING:
    from megatron_tropd.distill.inputs import Inputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0, or a code that says what went wrong (``exits.py``; message on stderr).
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse wants all positionals together; overrides may also stand after an option.
    if any(word.startswith("-") for word in rest) or not hasattr(arguments, "overrides"):
        parser.parse_args(argv)
    else:
        arguments.overrides += rest
    command: Callable[[argparse.Namespace], int] = arguments.command
    return exit_code(lambda: command(arguments))


def exit_code(action: Callable[[], int | None]) -> int:
    """Do something; an error that has a name becomes a message and an exit code."""
    try:
        return action() or exits.COMPLETE
    except (ConfigError, InputError) as error:
        print(f"tropd: {error}", file=sys.stderr)
        return exits.CONFIG
    except TrainingError as error:
        print(f"tropd: {error}", file=sys.stderr)
        return KINDS[error.kind]
    except OSError as error:
        if kind_of(error) != "disk":
            raise
        print(f"tropd: {error}. Make room or mend the file system.", file=sys.stderr)
        return KINDS["disk"]
    except KeyboardInterrupt:
        return exits.stopped_by(signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tropd", description="Trust Region On-Policy Distillation on Megatron-Core and vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    distill = commands.add_parser("distill", help="train a student from a TOML file")
    distill.add_argument("config", type=Path, help="TOML file")
    distill.add_argument("overrides", nargs="*", metavar="section.key=value")
    distill.add_argument(
        "--dry-run", action="store_true", help="check everything, print the settings, stop"
    )
    distill.set_defaults(command=_distill)
    add_slurm(commands.add_parser("slurm", help="write or submit the Slurm job of a run"))
    _add_serve(commands.add_parser("serve", help="one rollout server of a run"))
    _add_plan(commands.add_parser("plan", help="memory, traffic and seconds before anything runs"))
    _add_rehearse(
        commands.add_parser("rehearse", help="execute one step at full size, on fake tensors")
    )
    report = commands.add_parser("report", help="write the HTML report of a run")
    report.add_argument("run", type=Path, help="run folder")
    report.set_defaults(command=_report)
    _add_evaluate(commands.add_parser("evaluate", help="measure a run's student, or any model"))
    _add_convert(commands.add_parser("convert", help="HF folder <-> Megatron checkpoint"))
    doctor = commands.add_parser("doctor", help="what is installed and what would be used")
    doctor.add_argument("config", type=Path, nargs="?", help="TOML file: are its options good here")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--number", type=int, required=True, help="of this server, below rollout.num_engines"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; beyond loopback with a token"
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.set_defaults(command=_serve)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder (its student, with its settings), or HF folder")
    add("problems", type=Path, nargs="?", help="JSON lines; default: the run's held-out problems")
    add("--like", type=Path, metavar="RUN", help="use the settings of this run for an HF folder")
    add("--max-new-tokens", type=int, default=None, help="longest answer, not the run's")
    add("--num-problems", type=int, default=None, help="only the first ones, not the run's number")
    add(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether to wrap prompts in it, whatever the run does",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16"), default=None, help="not the run's")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_evaluate)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file; models may be a config.json alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--hardware", default="h100", help="a100, h100, h200 or a TOML file (docs/planning.md)"
    )
    parser.add_argument(
        "--gpus", type=int, default=None, help="recommend for so many; default: the config's"
    )
    parser.add_argument("--gpus-per-node", type=int, default=None, help="default: the hardware's")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of a prompt")
    parser.add_argument(
        "--response-tokens",
        type=float,
        default=None,
        help="average length of a response; default: rollout.max_new_tokens",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_plan_run)


def _add_rehearse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file; models may be a config.json alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--rank",
        type=int,
        action="append",
        default=[],
        help="which; may be repeated; default: one of the first, a middle and the last stage",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="of the cluster")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="length of a prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object with everything")
    parser.set_defaults(command=_rehearse)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    add_to_megatron(directions.add_parser("to-megatron", help="HF folder to Megatron checkpoint"))
    add_to_hf(directions.add_parser("to-hf", help="Megatron checkpoint to HF folder"))


def _distill(arguments: argparse.Namespace) -> int:
    from megatron_tropd.base.deterministic import set_environment
    from megatron_tropd.config.run_folder import started_at
    from megatron_tropd.launch.launcher import is_rank

    started_at()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from megatron_tropd.config.run_folder import check_run, with_date
        from megatron_tropd.distill.inputs import load_inputs
        from megatron_tropd.mcore.options_check import check_options

        config = with_date(config)
        check_run(config)
        inputs = load_inputs(config)
        check_options(config, student=inputs.student.config, teacher=inputs.teacher.config)
        print(json.dumps(config_to_dict(config), indent=2))
        print(_plan(config, inputs))
        return exits.COMPLETE
    # Whoever starts a process hands it on, before CUDA or an engine reads it.
    set_environment(config.run.deterministic)
    return _distill_as_rank(config) if is_rank() else _distill_as_launcher(config, find_nodes())


def _distill_as_launcher(config: Config, nodes: Nodes) -> int:
    """Start this node's ranks; node 0 prepares the run for all nodes."""
    from megatron_tropd.launch.launcher import follow, start_first

    def share() -> int:
        with _noting_lost_nodes(config):
            return (follow if nodes.rank else _lead)(config, peers, first)

    complete = RunFolder(Path(config.run.dir)).read_summary() is not None
    with (
        _noting_lost_nodes(config),
        nullcontext() if complete else start_first(config, nodes) as first,
        Peers(nodes) as peers,
    ):
        code = exit_code(share)
        peers.end(code)
        peers.let_node_0_end()
        return code


@contextmanager
def _noting_lost_nodes(config: Config) -> Iterator[None]:
    """Leave the reason where a job looks: srun may show it the code of a node that it killed."""
    try:
        yield
    except NodeLost as error:
        failure = Failure(kind=error.kind, message=str(error))
        report(RunFolder(Path(config.run.dir)).failure, failure)
        raise


def _serve(arguments: argparse.Namespace) -> int:
    from megatron_tropd.cli.serve import serve

    config = load_config(arguments.config, arguments.overrides)
    return serve(config, number=arguments.number, host=arguments.host, port=arguments.port)


def _plan_run(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from megatron_tropd.planning import load_hardware, make_plan, plan_json, plan_table

    config = load_config(arguments.config, arguments.overrides)
    _check_option_types(config)
    hardware = load_hardware(arguments.hardware)
    if arguments.gpus_per_node is not None:
        hardware = replace(hardware, gpus_per_node=arguments.gpus_per_node)
    plan = make_plan(
        config,
        hardware,
        gpus=arguments.gpus,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
    )
    print(json.dumps(plan_json(plan)) if arguments.json else plan_table(plan))
    return 0


def _rehearse(arguments: argparse.Namespace) -> int:
    from megatron_tropd.rehearsal import rehearsal_json, rehearsal_table, rehearse

    rehearsed = rehearse(
        load_config(arguments.config, arguments.overrides),
        ranks=arguments.rank,
        prompt_tokens=arguments.prompt_tokens,
        gpus_per_node=arguments.gpus_per_node,
    )
    print(json.dumps(rehearsal_json(rehearsed)) if arguments.json else rehearsal_table(rehearsed))
    return 0


def _check_option_types(config: Config) -> None:
    """Refuse options that the installed Megatron does not have; without Megatron, none."""
    if not config.megatron.lines() or find_spec("megatron") is None:
        return
    # What this machine lacks says nothing of the one that is planned for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_tropd.mcore.options_check import check_types
    check_types(config.megatron)


def _lead(config: Config, peers: Peers, first: FirstRank | None) -> int:
    from megatron_tropd.config.run_folder import hold, patience, with_date

    config = with_date(config)
    # Errors of the inputs come before anything is written.
    if first is not None and (code := first.check(config)):
        return code
    with hold(Path(config.run.dir).resolve(), patience()):
        return _lead_alone(config, peers, first)


def _lead_alone(config: Config, peers: Peers, first: FirstRank | None = None) -> int:
    from megatron_tropd.base.failures import SYMPTOMS, read
    from megatron_tropd.config.run_folder import open_run
    from megatron_tropd.launch.launcher import lead

    folder = open_run(config)
    summary = folder.read_summary()
    if summary is None:
        code = lead(config.parallel.world_size, folder, peers, first)
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

    report = write_report(folder.root)
    print(summary_table(summary or {}))
    print(f"Student (HF folder): {folder.student}\nReport:              {report}")
    return exits.COMPLETE


def _say_stopped(code: int, logs: Path) -> None:
    if exits.is_stop(code):
        print("tropd: stopped; the same command resumes.", file=sys.stderr)
    else:
        print(f"tropd: a rank ended with code {code}. Logs: {logs}", file=sys.stderr)


def _distill_as_rank(config: Config) -> int:
    """torchrun started us: this process is a rank; rank 0 locks and opens the folder."""
    from megatron_tropd.config.run_folder import hold, patience

    world = number("WORLD_SIZE")
    if world != config.parallel.world_size:
        raise ConfigError(
            f"The launcher started {world} ranks, the config asks for tensor x pipeline x data = "
            f"{config.parallel.world_size}. Change parallel.* or the number of ranks."
        )
    is_first = number("RANK") == 0
    root = Path(config.run.dir).resolve()
    with hold(root, patience()) if is_first else nullcontext():
        return _as_rank(config, is_first=is_first)


def _as_rank(config: Config, *, is_first: bool) -> int:
    from megatron_tropd.config.run_folder import open_run, wait_until_open
    from megatron_tropd.launch.rank import leave, run_rank

    folder = open_run(config) if is_first else wait_until_open(config)
    if folder.read_summary():
        return exits.COMPLETE
    code = run_rank(folder, announce=True)
    if is_first and folder.read_summary():
        from megatron_tropd.report.html import write_report

        write_report(folder.root)
    leave(code)


def _plan(config: Config, inputs: "Inputs") -> str:
    from megatron_tropd.convert.families import describe

    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    p = config.parallel
    shared = f", experts over {p.expert}" if p.expert > 1 else ""
    guidance = f"{len(inputs.responses)} prompts have one" if inputs.responses else "off"
    return "\n".join(
        [
            f"ranks:      {p.world_size} (TP {p.tensor} x PP {p.pipeline} x DP {p.data}{shared})",
            f"student:    {describe(inputs.student.config)}",
            f"teacher:    {describe(inputs.teacher.config)}",
            *_left_unread(inputs),
            f"vocabulary: {inputs.vocab_size} shared columns, context {inputs.context} tokens",
            f"stop ids:   {', '.join(map(str, inputs.stop_token_ids))}",
            f"prompts:    {len(inputs.prompts)}, {config.rollout.prompts_per_step} a step x "
            f"{config.rollout.samples_per_prompt} samples = {samples} trajectories",
            f"teacher responses: {guidance}",
            f"held-out:   {len(inputs.problems)} problems",
            f"steps:      {config.train.steps}",
            *(f"option:     {line}" for line in config.megatron.lines()),
            f"run folder: {Path(config.run.dir).resolve()}",
            "dry run: nothing was written.",
        ]
    )


def _left_unread(inputs: "Inputs") -> list[str]:
    """A line for each model whose folder holds safetensors files that are not the model's."""
    from megatron_tropd.convert.hf_folder import HFFolder

    folders = {"student": inputs.student, "teacher": inputs.teacher}
    return [
        f"not read:   {', '.join(folder.unread)} ({who}: not files of its model)"
        for who, folder in folders.items()
        if isinstance(folder, HFFolder) and folder.unread
    ]


def _report(arguments: argparse.Namespace) -> int:
    from megatron_tropd.report.html import write_report

    print(write_report(arguments.run))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_tropd.cli.evaluate import Overrides, evaluate, result_lines

    result = evaluate(
        arguments.model,
        arguments.problems,
        like=arguments.like,
        overrides=Overrides(
            max_new_tokens=arguments.max_new_tokens,
            num_problems=arguments.num_problems,
            apply_chat_template=arguments.chat_template,
            dtype=arguments.dtype,
        ),
    )
    print(json.dumps(result) if arguments.json else "\n".join(result_lines(result)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_tropd.cli import doctor

    words = [arguments.config, *arguments.overrides] if arguments.config else []
    return doctor.main(list(map(str, words)))
