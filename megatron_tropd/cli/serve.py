"""``tropd serve``: one rollout server of a run, from its config."""

import argparse
from pathlib import Path

from megatron_tropd.config import load_config
from megatron_tropd.config.hub import with_local_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd serve``."""
    parser.add_argument("config", type=Path, help="TOML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--number", type=int, required=True, help="of this server, below rollout.num_engines"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; beyond loopback with a token"
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")


def run(arguments: argparse.Namespace) -> int:
    """Serve until the run is complete or a signal comes."""
    from megatron_tropd.cli.serving import serve

    config = with_local_models(load_config(arguments.config, arguments.overrides))
    return serve(config, number=arguments.number, host=arguments.host, port=arguments.port)
