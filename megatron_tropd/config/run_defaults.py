"""Options of commands that read prompts and sample; a run may answer those that are left out."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import Config, load_config
from megatron_tropd.config.run_folder import run_of


class RunParser(argparse.ArgumentParser):
    """A parser whose command may name a run, for what its other options leave out."""

    _settings: Callable[[Config], Mapping[str, Any]] | None = None

    def take_from_run(self, settings: Callable[[Config], Mapping[str, Any]]) -> None:
        """Add ``--run``; options that the run answers are no longer required.

        Args:
            settings: from a run's config to values of the command's options, by their names.
        """
        self._settings = settings
        self.add_argument(
            "--run",
            type=Path,
            help="run folder, or TOML file of a run: defaults of the options here",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; what the run gave is said on stderr.

        Raises:
            InputError: there is no such run.
            ConfigError: its TOML file cannot be read.
        """
        if self._settings is None:
            return super().parse_known_args(args, namespace)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--run", type=Path)
        run = first.parse_known_args(args)[0].run
        taken = self._take(_config_of(run)) if run else {}
        options, rest = super().parse_known_args(args, namespace)
        used = [
            f"{name} {value}"
            for name, value in taken.items()
            if str(getattr(options, name)) == str(value)
        ]
        if run:
            print(f"from {run}: {', '.join(used)}", file=sys.stderr)
        return options, rest

    def _take(self, config: Config) -> dict[str, Any]:
        """Make the run's settings the defaults of the options; which, and of what value."""
        assert self._settings is not None
        values = {**_prompt_settings(config), **self._settings(config)}
        taken = {}
        for action in self._actions:
            value = values.get(action.dest)
            if value not in (None, ""):
                # A default that is text is read as if it stood in the command.
                text = json.dumps(value) if isinstance(value, dict) else value
                action.default = list(text) if isinstance(text, tuple) else text
                taken[action.dest] = action.default
                action.required = False
        return taken


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how lines of ``--prompts`` become token ids."""
    add = parser.add_argument
    add("--prompts", required=True, help="file or data set, as rollout.prompts (docs/prompts.md)")
    shown = '\'{"split": "test", "fields": {"prompt": "question"}}\''
    add("--data", metavar="JSON", help=f"as [rollout.data]: {shown}")
    add("--apply-chat-template", action="store_true", help="wrap prompts in the chat template")
    add("--chat-template-kwargs", default="{}", help="what it reads beside messages, as JSON")
    add("--chat-template-date", help="YYYY-MM-DD, for one that reads the clock (default: --out's)")
    add("--filter-overlong-prompts", action="store_true", help="leave out prompts that do not fit")
    add("--system-prompt", default="", help="first message of a conversation that has none")
    add("--prompt-template", default="", help='Jinja text, such as "{{ prompt }} Be brief."')


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that starts one engine, on GPUs that it has to itself."""
    add = parser.add_argument
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the model")
    add("--tensor-parallel", type=int, default=1, help="GPUs of the engine (default 1)")
    add("--gpu-share", type=float, help="of each GPU's memory (default 0.85)")
    add("--cpu-kv-gib", type=float, default=1.0, help="GiB of KV cache without CUDA (%(default)s)")
    add("--max-num-seqs", type=int, help="most sequences decoded together (default: vLLM's)")
    add("--max-num-batched-tokens", type=int, help="most tokens of one pass (default: vLLM's)")
    add("--threads", type=int, help="CPU threads (default: all)")


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
