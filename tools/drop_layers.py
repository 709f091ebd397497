#!/usr/bin/env python3
"""Depth pruning, a model without some of its layers as a student: ``tropd drop-layers``."""

import sys

from megatron_tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["drop-layers", *sys.argv[1:]]))
