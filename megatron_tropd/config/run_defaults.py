"""Options of a tool that take a run's settings where the command does not say otherwise."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import Config, load_config
from megatron_tropd.config.run_folder import run_of


def parse_with_run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    settings: Callable[[Config], Mapping[str, Any]],
) -> argparse.Namespace:
    """Parse a command line that may name a run with ``--run``.

    Args:
        parser: gets the option; options that the run answers are no longer required.
        arguments: without the program's name; None: those of the process.
        settings: from a run's config to values of the tool's options, by their names.

    Returns:
        The parsed values; what the command leaves out comes from the run, which is said on stderr.

    Raises:
        InputError: there is no such run.
        ConfigError: its TOML file cannot be read.
    """
    parser.add_argument(
        "--run", type=Path, help="run folder, or TOML file of a run: defaults of the options here"
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run", type=Path)
    run = first.parse_known_args(arguments)[0].run
    if run is None:
        return parser.parse_args(arguments)
    config = _config_of(run)
    values = {**_prompt_settings(config), **settings(config)}
    taken = {}
    for action in parser._actions:
        value = values.get(action.dest)
        if value not in (None, ""):
            # A default that is text is read as if it stood in the command.
            text = json.dumps(value) if isinstance(value, dict) else value
            action.default = taken[action.dest] = list(text) if isinstance(text, tuple) else text
            action.required = False
    options = parser.parse_args(arguments)
    used = [
        f"{name} {value}"
        for name, value in taken.items()
        if str(getattr(options, name)) == str(value)
    ]
    print(f"from {run}: {', '.join(used)}", file=sys.stderr)
    return options


def _config_of(run: Path) -> Config:
    found = run_of(run)
    if found is not None:
        return found.read_config()
    if run.is_dir():
        raise InputError(
            f"{run} is no run folder: give one that `tropd distill` wrote (run.dir), or the TOML "
            "file of a run."
        )
    return load_config(run)


def _prompt_settings(config: Config) -> dict[str, Any]:
    """What decides of a run's prompts and samples, by the names that config and tools share."""
    data = asdict(config.rollout.data)
    rollout = {**vars(config.rollout), "data": {k: v for k, v in data.items() if v} or None}
    return {**rollout, "seed": config.train.seed, "dtype": config.model.dtype}
