"""``tropd rehearse``: one step of a run at its full size, on fake tensors."""

import argparse
import json
from pathlib import Path

from megatron_tropd.config import load_config
from megatron_tropd.config.hub import with_local_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd rehearse``."""
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
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=None,
        help="length of what teacher.context makes; default: the longest that there is room for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with everything")


def run(arguments: argparse.Namespace) -> int:
    """Execute one step on fake tensors and print what it took."""
    from megatron_tropd.rehearsal import rehearsal_json, rehearsal_table, rehearse

    rehearsed = rehearse(
        with_local_models(load_config(arguments.config, arguments.overrides), weights=False),
        ranks=arguments.rank,
        prompt_tokens=arguments.prompt_tokens,
        context_tokens=arguments.context_tokens,
        gpus_per_node=arguments.gpus_per_node,
    )
    print(json.dumps(rehearsal_json(rehearsed)) if arguments.json else rehearsal_table(rehearsed))
    return 0
