"""The engines that a run's settings ask for: trainer, server and evaluation make them here."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.base.environment import number
from megatron_tropd.config import Config
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.dispatch import Patience
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.rollout.engines.client import ClientSettings
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.engines.process import engine_threads
from megatron_tropd.rollout.engines.served import ServerPool
from megatron_tropd.rollout.engines.wire import Model, served_settings
from megatron_tropd.rollout.weights.versions import WeightVersions

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
    teacher: Path | None = None,
) -> RolloutEngine:
    """Start an engine that samples as the settings say; returns while it is still starting.

    Args:
        log_file: what the engine prints is appended here.
        threads: CPU threads of the engine; None: as many as this process may use.
        alone: no model is on its GPUs, so that it takes more than ``rollout.engine_gpu_share``.
        teacher: HF folder of the teacher if responses come from between the two.
    """
    rollout = config.rollout
    share = rollout.engine_gpu_share
    return RolloutEngine(
        folder,
        dtype=engine_dtype(config.model.dtype),
        max_model_len=inputs.longest_rollout(rollout) if teacher else inputs.max_model_len,
        teacher_folder=teacher,
        draft_tokens=rollout.draft_tokens,
        vocab_size=inputs.vocab_size,
        gpu_share=max(share, MEMORY_ALONE) if alone else share,
        cpu_kv_gib=rollout.engine_cpu_kv_gib,
        tensor_parallel=rollout.engine_tensor_parallel,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        threads=threads,
        log_file=log_file,
    )


def start_engines(
    model: Model,
    config: Config,
    folder: RunFolder,
    make: Callable[..., RolloutEngine],
    *,
    rank: int,
    world_size: int,
    teacher: Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> SamplingEngines:
    """Engines of a run for one of its models; returns while they are still starting.

    Args:
        make: :func:`make_engine` of the config, inputs and folder of weights.
        teacher: HF folder of the teacher if responses come from between the two.
        stopping: whether the run was asked to stop, after which servers may be gone.
    """
    rollout = config.rollout
    if rollout.placement == "separate":
        return ServerPool(
            ClientSettings(folder.servers, served_settings(config)),
            WeightVersions(folder.weights),
            rank=rank,
            num_servers=rollout.num_engines,
            model=model,
            patience=Patience.within(60 * config.run.timeout_minutes),
            stopping=stopping,
        )
    threads = engine_threads(rollout.num_engines, number("LOCAL_WORLD_SIZE", 1), world_size)

    name = "blended" if teacher else model

    def make_numbered(engine: int) -> RolloutEngine:
        return make(
            threads=threads,
            log_file=folder.logs / f"engine_{name}_{engine:03d}.log",
            teacher=teacher,
            alone=model == "teacher",  # its engines have ended before anything is built
        )

    return EnginePool(
        rank=rank,
        world_size=world_size,
        num_engines=rollout.num_engines,
        make_engine=make_numbered,
        transport=None if model == "teacher" else rollout.weight_transport,
    )


def tool_engine(options: argparse.Namespace, folder: Path, **settings: Any) -> RolloutEngine:
    """Start the engine that options of ``config.run_defaults.add_engine_options`` ask for.

    Args:
        options: parsed; ``out`` is the tool's file, beside which the engine's log lies.

    Raises:
        InputError, ConfigError: the folder or an option is unusable.
    """
    return RolloutEngine(
        folder,
        log_file=options.out.with_name(options.out.name + ".engine.log"),
        dtype=engine_dtype(options.dtype),
        gpu_share=MEMORY_ALONE if options.gpu_share is None else options.gpu_share,
        cpu_kv_gib=options.cpu_kv_gib,
        tensor_parallel=options.tensor_parallel,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        threads=options.threads,
        **settings,
    )


def engine_dtype(name: str) -> str:
    """The compute type that ``model.dtype`` stands for on this machine."""
    automatic = "bfloat16" if torch.cuda.is_available() else "float32"
    return automatic if name == "auto" else name
