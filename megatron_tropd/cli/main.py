"""The ``tropd`` command: one file of this room for each subcommand, imported if it is asked for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from megatron_tropd.base.failures import exit_code

COMMANDS = {
    "distill": "train a student from a TOML file",
    "score": "the teacher's signals of recorded rollouts, for runs without a teacher",
    "slurm": "write or submit the Slurm job of a run",
    "serve": "one rollout server of a run",
    "plan": "memory, traffic and seconds before anything runs",
    "rehearse": "execute one step at full size, on fake tensors",
    "report": "write the HTML report of a run",
    "evaluate": "measure a run's student, or any model",
    "compare": "two models' answers to the same problems",
    "convert": "HF folder <-> Megatron checkpoint",
    "doctor": "what is installed and what would be used",
}
"""What each does. Its module has ``add_arguments(parser)`` and ``run(arguments)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0, or a code that says what went wrong (``exits.py``; message on stderr).
    """
    words = sys.argv[1:] if argv is None else argv
    parser = _parser(next((word for word in words if word in COMMANDS), None))
    arguments, rest = parser.parse_known_args(words)
    # argparse wants all positionals together; overrides may also stand after an option.
    if any(word.startswith("-") for word in rest) or not hasattr(arguments, "overrides"):
        parser.parse_args(words)
    else:
        arguments.overrides += rest
    return exit_code(lambda: _module(arguments.command).run(arguments))


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tropd", description="Trust Region On-Policy Distillation on Megatron-Core and vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == wanted:
            _module(name).add_arguments(command)
    return parser


def _module(name: str) -> ModuleType:
    return import_module(f"megatron_tropd.cli.{name}")
