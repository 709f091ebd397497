#!/usr/bin/env python3
"""HF folder to Megatron checkpoint: ``tropd convert to-megatron``."""

import sys

from megatron_tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-megatron", *sys.argv[1:]]))
