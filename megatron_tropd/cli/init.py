"""``tropd init``: the TOML file of a run for a pair of models and a number of GPUs.

The planner chooses the layout, the engines and what saves memory; this writes it down.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import replace_text
from megatron_tropd.config import Config, config_from_dict, config_to_dict, load_config
from megatron_tropd.config.hub import local_model

if TYPE_CHECKING:
    from megatron_tropd.planning.estimate import Estimate

_ROWS = 512
"""Positions by which a micro-batch is rounded up."""
_LAYOUT = (
    "placement",
    "num_engines",
    "engine_tensor_parallel",
    "engine_gpu_share",
    "steps_ahead",
)
"""What of [rollout] the planner decides."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd init``."""
    add = parser.add_argument
    add("student", help="HF folder, a folder with its config.json alone, or hf://OWNER/NAME")
    add("teacher", help="the same of the teacher")
    add("--gpus", type=int, default=8, help="in all (default 8)")
    add("--hardware", default="h100", help="a100, h100, h200 or a TOML file (docs/planning.md)")
    add("--max-new-tokens", type=int, default=2048, help="longest response (default 2048)")
    add("--prompt-tokens", type=int, default=512, help="longest prompt (default 512)")
    add("--prompts", default="prompts.jsonl", help="file or data set (default prompts.jsonl)")
    add("--prompts-per-step", type=int, default=64, help="(default 64, of 4 samples each)")
    add("--steps", type=int, default=200, help="(default 200)")
    add("--run-dir", default="runs/mine", help="folder of the run (default runs/mine)")
    add("--out", type=Path, default=Path("tropd.toml"), help="file to write (default tropd.toml)")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and say what was planned."""
    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists already. Remove it or name another with --out.")
    best, why = _plan(arguments)
    text = _render(arguments, best)
    _write(arguments.out, text)
    print(textwrap.fill(f"{_summary(best)}. Chosen as {why}.", 98))
    print(
        f"wrote {arguments.out}\n\n"
        f"tropd plan {arguments.out} --hardware {arguments.hardware}    # the same in full\n"
        f"tropd distill {arguments.out} --dry-run       # check models, prompts and tokenizers\n"
        f"tropd distill {arguments.out}"
    )
    return 0


def _plan(arguments: argparse.Namespace) -> "tuple[Estimate, str]":
    """Find the layout to use, and why."""
    from dataclasses import replace

    from megatron_tropd.planning.hardware import load_hardware
    from megatron_tropd.planning.plan import make_plan

    if arguments.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, found {arguments.gpus}.")
    hardware = load_hardware(arguments.hardware)
    per_node = min(arguments.gpus, hardware.gpus_per_node)
    plan = make_plan(
        _base(arguments),
        replace(hardware, gpus_per_node=per_node),
        gpus=arguments.gpus,
        prompt_tokens=arguments.prompt_tokens,
    )
    best = plan.recommended.best
    if not best.fits:
        raise ConfigError(
            f"Nothing was written: {plan.recommended.why}. Give more with --gpus, or lower "
            "--max-new-tokens."
        )
    return best, plan.recommended.why


def _base(arguments: argparse.Namespace) -> Config:
    """Make the settings before anything is laid out: one rank, one engine."""
    longest = arguments.prompt_tokens + arguments.max_new_tokens
    return config_from_dict(
        {
            "model": {
                "student": local_model(arguments.student, weights=False),
                "teacher": local_model(arguments.teacher, weights=False),
                "dtype": "bfloat16",
            },
            "rollout": {
                "prompts": arguments.prompts,
                "max_new_tokens": arguments.max_new_tokens,
                "prompts_per_step": arguments.prompts_per_step,
                "samples_per_prompt": 4,
            },
            "loss": {"method": "tropd_exact", "outlier": "clip", "tau": -2.5},
            "train": {
                "steps": arguments.steps,
                "lr": 5e-6,
                "warmup_steps": 5,
                "tokens_per_micro_batch": -(-longest // _ROWS) * _ROWS,
            },
            "run": {"dir": arguments.run_dir},
        }
    )


def _render(arguments: argparse.Namespace, best: "Estimate") -> str:
    """Write the chosen settings as TOML, each with what it means."""
    from megatron_tropd.config.described import describe_settings
    from megatron_tropd.planning.options import tables

    chosen = _chosen(arguments, best)
    texts = {setting.key: setting.text for setting in describe_settings()}
    head = (
        f"{_summary(best)}. All of this is an estimate, not calibrated, and was not run. "
        "The loss and its settings are those of the quickstart; `tropd files docs/losses.md` finds "
        "the page with all methods."
    )
    lines = [f"# {line}" for line in textwrap.wrap(head, 98)]
    for table, values in (*chosen.items(), *_options(tables(best.run.options))):
        lines.append(f"\n[{table}]")
        for key, value in values.items():
            lines += _commented(texts.get(f"{table}.{key}", ""))
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _options(found: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"megatron.{table}", values) for table, values in found.items()]


def _commented(text: str) -> list[str]:
    """The first sentence of a setting's text, as comments."""
    first, stop, _ = text.partition(". ")
    return [f"# {line}" for line in textwrap.wrap(first + stop.strip(), 98)]


def _chosen(arguments: argparse.Namespace, best: "Estimate") -> dict[str, dict[str, Any]]:
    """The tables of the file: what was asked for, and what the planner decided."""
    base = _base(arguments)
    settings = config_to_dict(base)
    defaults = config_to_dict(config_from_dict(_least(settings)))
    laid_out = vars(best.run.parallel)
    parallel = {k: v for k, v in laid_out.items() if v != defaults["parallel"][k]}
    engines = {key: getattr(best.run.rollout, key) for key in _LAYOUT}
    rollout = {k: settings["rollout"][k] for k in _ASKED} | {
        k: v for k, v in engines.items() if v != defaults["rollout"][k]
    }
    chosen = {
        "model": {
            "student": _named(arguments.student, arguments.out),
            "teacher": _named(arguments.teacher, arguments.out),
            "dtype": "bfloat16",
        },
        "parallel": parallel,
        "rollout": rollout,
        "loss": {"method": "tropd_exact", "outlier": "clip", "tau": -2.5},
        "train": {k: settings["train"][k] for k in ("steps", "lr", "warmup_steps")}
        | {"tokens_per_micro_batch": settings["train"]["tokens_per_micro_batch"]},
        "teacher": {"offload": best.run.options.teacher},
        "run": {"dir": arguments.run_dir},
    }
    if best.run.options.teacher == "none":
        del chosen["teacher"]
    return {table: values for table, values in chosen.items() if values}


_ASKED = ("prompts", "max_new_tokens", "prompts_per_step", "samples_per_prompt")


def _least(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that have no default."""
    return {
        "model": {key: settings["model"][key] for key in ("student", "teacher")},
        "rollout": {key: settings["rollout"][key] for key in ("prompts", "max_new_tokens")},
        "train": {"steps": settings["train"]["steps"]},
        "run": {"dir": settings["run"]["dir"]},
    }


def _named(model: str, out: Path) -> str:
    """A model as the file names it: relative to the file if it is below its folder."""
    if "://" in model:
        return model
    path, folder = Path(model).resolve(), out.resolve().parent
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _summary(best: "Estimate") -> str:
    from megatron_tropd.planning.estimate import layout_name

    return (
        f"Planned for {best.run.gpus} x {best.run.hardware.name}: {layout_name(best.run)}; "
        f"{best.peak / 1e9:.1f} GB at most on a GPU, {best.seconds.total:.0f} s a step"
    )


def _write(path: Path, text: str) -> None:
    """Write the file if it is a config, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    try:
        load_config(path)
    except ConfigError:
        path.unlink()
        raise
