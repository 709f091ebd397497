"""Every layout of a number of GPUs, and the engines beside it, that the trainer may accept."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import ModelParallelConfig, ParallelConfig, RolloutConfig
from megatron_tropd.planning.memory import engine_obstacle
from megatron_tropd.planning.planned_run import PlannedRun, check_engines

_SHARES = [n / 20 for n in range(2, 19)]
"""Of a GPU's memory for the engine: 0.1 to 0.9."""


def laid_out(run: PlannedRun, gpus: int, rollout: RolloutConfig) -> Iterator[PlannedRun]:
    """Every layout of the trainer's GPUs that it accepts, with every one of the teacher's."""
    for parallel in _layouts(run, gpus):
        for teacher in _of_teacher(run, parallel):
            try:
                yield run.laid_out(parallel, rollout, teacher)
            except ConfigError:
                continue


def _of_teacher(run: PlannedRun, parallel: ParallelConfig) -> list[ModelParallelConfig | None]:
    """The student's layout; the config's own; others that shard the teacher more than that.

    Of these what a dense teacher takes to be on fewer GPUs' memory: more tensor-parallel ranks,
    which its heads may allow and the student's not, in as many stages or in one.
    """
    configured, node = run.config.teacher.parallel, run.hardware.gpus_per_node
    layouts: list[ModelParallelConfig | None] = [None]
    if configured is not None:
        layouts.append(configured)
    if not run.can_move or any(model.shape.experts for model in run.frozen):
        return layouts
    found = [
        ModelParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            sequence_parallel=True,
            uneven_stages=any(model.shape.layers % pipeline for model in run.frozen),
        )
        for tensor in divisors(node)
        for pipeline in {1, parallel.pipeline}
        if tensor > parallel.tensor and pipeline * tensor > parallel.pipeline * parallel.tensor
    ]
    return layouts + [one for one in found if one != configured]


def _layouts(run: PlannedRun, gpus: int) -> Iterator[ParallelConfig]:
    """All axes, one inside the other; what does not divide is refused later."""
    shapes = [model.shape for model in run.models]
    mixture = any(shape.experts for shape in shapes)
    for tensor in divisors(gpus):
        if tensor > run.hardware.gpus_per_node or run.hardware.gpus_per_node % tensor:
            continue
        for pipeline in divisors(gpus // tensor):
            replicas = gpus // tensor // pipeline
            if pipeline > min(shape.layers for shape in shapes):
                continue
            experts = _expert_layouts(tensor, replicas) if mixture else [(1, None)]
            yield from (
                ParallelConfig(
                    tensor=tensor,
                    context=context,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    data=replicas // context,
                    expert=expert,
                    expert_tensor=expert_tensor,
                    uneven_stages=any(shape.layers % (pipeline * virtual) for shape in shapes),
                    sequence_parallel=tensor > 1,
                    distributed_optimizer=replicas > 1,
                )
                for virtual in _virtual_stages(pipeline, min(shape.layers for shape in shapes))
                for context in _contexts(run, tensor, replicas)
                for expert, expert_tensor in experts
            )


def _virtual_stages(pipeline: int, layers: int) -> list[int]:
    """Chunks of each stage: one or two, each with a layer of every model."""
    return [1, 2] if pipeline > 1 and 2 * pipeline <= layers else [1]


def _contexts(run: PlannedRun, tensor: int, replicas: int) -> Iterator[int]:
    """Ranks that share a row: within a node, and rows of a step for all that do not."""
    for context in range(1, run.hardware.gpus_per_node // tensor + 1):
        if replicas % context == 0 and run.work.trajectories % (replicas // context) == 0:
            yield context


def _expert_layouts(tensor: int, replicas: int) -> list[tuple[int, int | None]]:
    """(expert, expert_tensor): experts sharded like everything else, and whole."""
    whole = [(expert, 1) for expert in divisors(tensor * replicas)] if tensor > 1 else []
    return [*((expert, None) for expert in divisors(replicas)), *whole]


def colocated(run: PlannedRun, gpus: int, ahead: Literal[0, 1]) -> list[RolloutConfig]:
    """Each GPU belongs to one engine; the smallest first."""
    engines = replace(run.rollout, placement="colocated", steps_ahead=ahead)
    if run.hardware.layers == "cpu":
        return [replace(engines, num_engines=gpus, engine_tensor_parallel=1)]
    return [
        replace(
            engines,
            num_engines=gpus // size,
            engine_tensor_parallel=size,
            engine_gpu_share=share,
        )
        for size in divisors(min(gpus, run.hardware.gpus_per_node))
        for share in _SHARES
    ]


def apart(run: PlannedRun, nodes: int, ahead: Literal[0, 1]) -> list[RolloutConfig]:
    """Each GPU of some nodes belongs to one engine, which has what is not reserved."""
    node, reserve = run.hardware.gpus_per_node, run.hardware.reserve
    engines = replace(run.rollout, placement="separate", steps_ahead=ahead)
    if run.hardware.layers == "cpu":
        return [replace(engines, num_engines=nodes * node, engine_tensor_parallel=1)]
    share = max((share for share in _SHARES if share <= 1 - reserve), default=_SHARES[0])
    engines = replace(engines, engine_gpu_share=share)
    return [
        replace(engines, num_engines=nodes * node // size, engine_tensor_parallel=size)
        for size in divisors(node)
    ]


def usable(
    one: PlannedRun, engines: list[RolloutConfig]
) -> Iterator[tuple[RolloutConfig, PlannedRun]]:
    """The engines that the trainer accepts and that hold a sequence."""
    for rollout in engines:
        other = replace(one, rollout=rollout)
        try:
            check_engines(other)
        except ConfigError:
            continue
        if not engine_obstacle(other):
            yield rollout, other


@lru_cache(maxsize=1024)
def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
