"""Run a script of Megatron's training loop on a machine without a GPU.

    torchrun --nproc-per-node 2 -m megatron_tropd.integrations.on_cpu pretrain_gpt.py ARGUMENTS

What that takes is in ``mcore.platform``; with CUDA the script runs as it would by itself.
"""

import runpy
import sys

from megatron_tropd.mcore import platform


def main() -> None:
    """Run ``sys.argv[1]`` as ``__main__`` with the arguments after it."""
    if len(sys.argv) < 2:
        raise SystemExit("Expected a script to run, found no argument.")
    platform.prepare_training()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
