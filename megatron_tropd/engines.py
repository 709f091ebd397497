"""The engine that a run's settings ask for: trainer, server and evaluation make it here."""

from pathlib import Path

import torch

from megatron_tropd.config import Config
from megatron_tropd.inputs import Inputs
from megatron_tropd.rollout.engine import RolloutEngine

MEMORY_ALONE = 0.85
"""Share of its GPUs' memory for an engine that has them to itself but for processes without models;
a test compares it with the plan's."""


def make_engine(
    config: Config,
    inputs: Inputs,
    folder: Path,
    *,
    log_file: Path,
    threads: int | None = None,
    alone: bool = False,
) -> RolloutEngine:
    """Start an engine that samples as the settings say; returns while it is still starting.

    Args:
        config: of the run.
        inputs: what ``config`` names.
        folder: HF folder of the first weights.
        log_file: what the engine prints is appended here.
        threads: CPU threads of the engine; None: as many as this process may use.
        alone: no model is on its GPUs, so that it takes more than ``rollout.engine_memory``.

    Returns:
        The engine.
    """
    memory = config.rollout.engine_memory
    if alone and torch.cuda.is_available():
        memory = max(memory, MEMORY_ALONE)
    return RolloutEngine(
        folder,
        dtype=engine_dtype(config.model.dtype),
        max_model_len=inputs.max_model_len,
        vocab_size=inputs.vocab_size,
        memory=memory,
        tensor_parallel=config.rollout.engine_tensor_parallel,
        max_num_seqs=config.rollout.max_num_seqs,
        max_num_batched_tokens=config.rollout.max_num_batched_tokens,
        threads=threads,
        log_file=log_file,
    )


def engine_dtype(name: str) -> str:
    """The compute type that ``model.dtype`` stands for on this machine."""
    automatic = "bfloat16" if torch.cuda.is_available() else "float32"
    return automatic if name == "auto" else name
