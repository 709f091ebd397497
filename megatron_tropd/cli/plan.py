"""``tropd plan``: memory, traffic and seconds of a run before anything runs."""

import argparse
import json
import logging
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from megatron_tropd.config import Config, load_config
from megatron_tropd.config.hub import with_local_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd plan``."""
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
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=None,
        help="length of what teacher.context makes; default: the longest that there is room for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what a run would need."""
    from megatron_tropd.planning.hardware import load_hardware
    from megatron_tropd.planning.plan import make_plan
    from megatron_tropd.planning.report import plan_json, plan_table

    config = load_config(arguments.config, arguments.overrides)
    config = with_local_models(config, weights=False)
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
        context_tokens=arguments.context_tokens,
    )
    print(json.dumps(plan_json(plan)) if arguments.json else plan_table(plan))
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
