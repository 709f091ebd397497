"""The ``tropd`` command: one file of this room for each subcommand, imported if it is asked for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import megatron_tropd
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import exit_code
from megatron_tropd.config.run_defaults import RunParser

COMMANDS = {
    "init": "write the TOML file of a run, laid out by the planner",
    "distill": "train a student from a TOML file",
    "score": "the teacher's signals of recorded rollouts, for runs without a teacher",
    "slurm": "write or submit the Slurm job of a run",
    "serve": "one rollout server of a run",
    "plan": "memory, traffic and seconds before anything runs",
    "rehearse": "execute one step at full size, on fake tensors",
    "monitor": "watch a run in the terminal or a browser",
    "report": "write the HTML report of a run",
    "evaluate": "measure a run's student, or any model",
    "compare": "two models' answers to the same problems",
    "convert": "HF folder <-> Megatron checkpoint",
    "responses": "a teacher's responses, to cut prefixes from",
    "rollouts": "record samples of a student",
    "drop-layers": "a model without some of its layers, as a student",
    "files": "docs, configs, examples and the site file that texts name",
    "doctor": "what is installed and what would be used",
}
"""What each does. Its module has ``add_arguments(parser)`` and ``run(arguments)``."""

EXTRAS = {
    "train": (
        *("megatron", "transformers", "safetensors", "huggingface_hub", "sentencepiece"),
        *("numpy", "tqdm", "tensorboard", "rich"),
    ),
    "serve": ("fastapi", "uvicorn", "requests", "msgspec"),
    "cpu": ("vllm",),
    "tasks": ("datasets", "math_verify"),
}
"""Which extra of pyproject.toml brings a package that a command imports."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program name; None: those of the process.

    Returns:
        0, or a code that says what went wrong (``exits.py``; message on stderr).
    """
    words = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _run(words))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line; ``command`` names the subcommand.

    Raises:
        ConfigError, InputError: it names a run that cannot be read.
    """
    parser = _parser(_command(words))
    arguments, rest = parser.parse_known_args(words)
    # argparse wants all positionals together; overrides may also stand after an option.
    if any(word.startswith("-") for word in rest) or not hasattr(arguments, "overrides"):
        parser.parse_args(words)
    else:
        arguments.overrides += rest
    return arguments


def _run(words: Sequence[str]) -> int:
    try:
        arguments = parse(words)
        code: int = _module(arguments.command).run(arguments)
        return code
    except ModuleNotFoundError as error:
        raise _lacking(error, _command(words)) from error


def _command(words: Sequence[str]) -> str | None:
    return next((word for word in words if word in COMMANDS), None)


def _lacking(error: ModuleNotFoundError, command: str | None) -> Exception:
    """Say what to install if the wheel's extras bring what is missing; else the error itself."""
    package = (error.name or "").partition(".")[0]
    extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
    if extra is None:
        return error
    return ConfigError(
        f"`tropd {command}` needs the package {package}, which is not installed here. Install the "
        f"extra that brings it: pip install 'megatron-tropd[{extra}]'."
    )


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tropd", description="Trust Region On-Policy Distillation on Megatron-Core and vLLM."
    )
    parser.add_argument(
        "--version", action="version", version=f"megatron-tropd {megatron_tropd.__version__}"
    )
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", dest="command", parser_class=RunParser
    )
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == wanted:
            _module(name).add_arguments(command)
    return parser


def _module(name: str) -> ModuleType:
    return import_module(f"megatron_tropd.cli.{name.replace('-', '_')}")
