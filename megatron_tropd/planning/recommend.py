"""The fastest layout that fits: all of them, laid out, filtered and ranked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_tropd.config import ParallelConfig, RolloutConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.planning.estimate import Estimate, estimate, layout_name
from megatron_tropd.planning.seconds import rollout_seconds
from megatron_tropd.planning.setup import Setup, check_engines

_SHARES = [n / 20 for n in range(2, 19)]
"""Of a GPU's memory for the engine: 0.1 to 0.9."""
_EQUAL = 0.05
"""Estimates that differ by less than this share count as equal; the simpler layout is taken."""


@dataclass(frozen=True)
class Recommendation:
    """The layout to use, or the one that lacks least."""

    best: Estimate
    why: str
    """One line."""


def recommend(made: Setup, gpus: int) -> Recommendation:
    """Rank every layout of a number of GPUs by its expected seconds per step.

    Tensor parallelism stays within a node, sequence parallelism goes with it, the optimizer is
    sharded wherever there are replicas, and each GPU belongs to one engine. Everything else is
    as configured, ``train.tokens_per_micro_batch`` among it. Of layouts whose estimates differ by
    less than 5 % the one with the least parallelism is taken.

    Args:
        made: the run.
        gpus: how many there are.

    Raises:
        ConfigError: the trainer would accept no layout of so many GPUs.
    """
    estimates = [estimate(_with_engines(one)) for one in _laid_out(made, gpus)]
    if not estimates:
        raise ConfigError(
            f"No layout of {gpus} GPUs divides the two models and the "
            f"{made.work.trajectories} trajectories of a step. Choose another number of GPUs."
        )
    fitting = [e for e in estimates if e.fits]
    if fitting:
        return _fastest(fitting, len(estimates))
    nearest = min(estimates, key=lambda e: e.peak)
    usable = made.hardware.usable_bytes
    return Recommendation(
        nearest,
        f"none of {len(estimates)} layouts fits; this one needs least, {nearest.peak / 1e9:.1f} of "
        f"{usable / 1e9:.1f} GB. Take more GPUs, or lower train.tokens_per_micro_batch and "
        "rollout.max_new_tokens",
    )


def _fastest(fitting: list[Estimate], count: int) -> Recommendation:
    """The simplest of the layouts that are as fast as the fastest."""
    fastest = min(fitting, key=lambda e: e.seconds.total)
    limit = fastest.seconds.total * (1 + _EQUAL)
    equal = [e for e in fitting if e.seconds.total <= limit]
    best = min(equal, key=lambda e: (_complexity(e.made), e.seconds.total))
    which = "the fastest"
    if best is not fastest:
        slower = 100 * (best.seconds.total / fastest.seconds.total - 1)
        which = (
            f"within {slower:.1f} % of the fastest ({layout_name(fastest.made)}) and simpler, "
            "hence taken,"
        )
    return Recommendation(best, f"{which} of {len(fitting)} layouts that fit, of {count} possible")


def _complexity(made: Setup) -> int:
    p = made.parallel
    return p.tensor * p.pipeline * p.expert


def _laid_out(made: Setup, gpus: int) -> Iterator[Setup]:
    """Every layout that the trainer accepts, with one engine on each GPU, or the servers."""
    engines = made.rollout
    if not made.separate:
        engines = replace(made.rollout, num_engines=gpus, engine_tensor_parallel=1)
    for parallel in _layouts(made, gpus):
        try:
            yield made.laid_out(parallel, engines)
        except ConfigError:
            continue


def _layouts(made: Setup, gpus: int) -> Iterator[ParallelConfig]:
    shapes = (made.student.shape, made.teacher.shape)
    mixture = any(shape.experts for shape in shapes)
    for tensor in _divisors(gpus):
        if tensor > made.hardware.gpus_per_node or made.hardware.gpus_per_node % tensor:
            continue
        for pipeline in _divisors(gpus // tensor):
            data = gpus // tensor // pipeline
            for expert in _divisors(data) if mixture else [1]:
                yield ParallelConfig(
                    tensor=tensor,
                    pipeline=pipeline,
                    data=data,
                    expert=expert,
                    uneven_stages=any(shape.layers % pipeline for shape in shapes),
                    sequence_parallel=tensor > 1,
                    distributed_optimizer=data > 1,
                )


def _with_engines(made: Setup) -> Setup:
    """The engines that sample fastest beside this layout: the smallest that are as fast.

    Servers stay as configured: their GPUs are not the trainer's.
    """
    if made.separate:
        return made
    resident = max(stage.resident for stage in estimate(made).memory)
    usable = made.hardware.usable_bytes - resident
    best, least = made, float("inf")
    for rollout in _engines(made, usable):
        one = replace(made, rollout=rollout)
        try:
            check_engines(one)
        except ConfigError:
            continue
        took = rollout_seconds(one)
        if took < least * (1 - _EQUAL):
            best, least = one, took
    return best


def _engines(made: Setup, usable: float) -> Iterator[RolloutConfig]:
    gpus = made.parallel.world_size
    for tensor in _divisors(min(gpus, made.hardware.gpus_per_node)):
        for share in _SHARES:
            if share * made.hardware.memory_gb * 1e9 <= usable:
                yield replace(
                    made.rollout,
                    num_engines=gpus // tensor,
                    engine_tensor_parallel=tensor,
                    engine_memory=share,
                )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
