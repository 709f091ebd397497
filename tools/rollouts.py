#!/usr/bin/env python3
"""A student's samples, recorded for training that is driven from outside: ``tropd rollouts``."""

import sys

from megatron_tropd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["rollouts", *sys.argv[1:]]))
