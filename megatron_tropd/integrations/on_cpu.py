"""Run a script of Megatron's training loop on a machine without a GPU.

    torchrun --nproc-per-node 2 -m megatron_tropd.integrations.on_cpu pretrain_gpt.py ARGUMENTS

What that takes is in ``mcore.cpu``; with CUDA the script runs as it would by itself.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run ``sys.argv[1]`` as ``__main__`` with the arguments after it, as ``python`` would."""
    if len(sys.argv) < 2:
        raise SystemExit("Expected a script to run, found no argument.")
    sys.argv = sys.argv[1:]
    # As python does: what lies beside the script is imported first. That may be a whole checkout
    # of Megatron, so before anything of Megatron is imported.
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    from megatron_tropd.mcore import platform

    platform.prepare_training()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
