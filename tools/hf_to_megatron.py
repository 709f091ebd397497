#!/usr/bin/env python3
"""An HF folder to a Megatron torch_dist checkpoint, bit for bit; any size, little memory.

Example: python tools/hf_to_megatron.py --hf Qwen3-1.7B --megatron Qwen3-1.7B-megatron --verify
"""

import sys

from megatron_tropd.cli.convert import main_to_megatron

if __name__ == "__main__":
    sys.exit(main_to_megatron())
