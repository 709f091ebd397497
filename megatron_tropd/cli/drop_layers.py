"""``tropd drop-layers``: depth pruning, a model without some of its layers as a student."""

import argparse
from pathlib import Path

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.hub import model_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd drop-layers``."""
    parser.add_argument("--model", type=model_argument, required=True, help="HF folder to prune")
    parser.add_argument("--out", type=Path, required=True, help="HF folder to write")
    parser.add_argument("--drop", required=True, help="0-based layers, comma-separated: 3 or 2,3")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder."""
    from megatron_tropd.convert.pruning import drop_layers

    try:
        layers = [int(number) for number in arguments.drop.split(",")]
    except ValueError:
        raise ConfigError(
            f"--drop must be layer numbers such as 3 or 2,3, found {arguments.drop!r}."
        ) from None
    drop_layers(arguments.model, arguments.out, layers)
    print(f"wrote {arguments.out}")
    return 0
