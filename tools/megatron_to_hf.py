#!/usr/bin/env python3
"""Megatron checkpoint to HF folder: ``tropd convert to-hf``."""

import sys

from megatron_tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
