#!/usr/bin/env python3
"""Depth pruning: an HF model folder without some of its layers, as a student to distil.

Example: python tools/drop_layers.py --model teacher --out student --drop 3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.config.hub import model_argument
from megatron_tropd.convert.pruning import drop_layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=model_argument, required=True, help="HF folder to prune")
    parser.add_argument("--out", type=Path, required=True, help="HF folder to write")
    parser.add_argument("--drop", required=True, help="0-based layers, comma-separated: 3 or 2,3")
    options = parser.parse_args(arguments)
    try:
        drop_layers(options.model, options.out, [int(n) for n in options.drop.split(",")])
    except ValueError as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
