#!/usr/bin/env python3
"""A teacher's responses to a prompts file, for off-policy guidance: ``tropd responses``."""

import sys

from megatron_tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["responses", *sys.argv[1:]]))
