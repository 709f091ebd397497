#!/usr/bin/env python3
"""A Megatron torch_dist checkpoint to an HF folder, bit for bit; any size, little memory.

Example: python tools/megatron_to_hf.py --megatron runs/x/checkpoints/step_000100 --hf student
"""

import sys

from megatron_tropd.cli.convert import main_to_hf

if __name__ == "__main__":
    sys.exit(main_to_hf())
