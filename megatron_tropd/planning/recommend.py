"""The fastest layout that fits: all of them, laid out, filtered and ranked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import ParallelConfig, RolloutConfig
from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.planning.estimate import Estimate, estimate, layout_name
from megatron_tropd.planning.memory import engine_memory, engine_obstacle, fullest_stages
from megatron_tropd.planning.options import Options, Recompute, effort, offloading, recomputing
from megatron_tropd.planning.planned_run import PlannedRun, check_engines
from megatron_tropd.planning.seconds import rollout_seconds

_SHARES = [n / 20 for n in range(2, 19)]
"""Of a GPU's memory for the engine: 0.1 to 0.9."""
_EQUAL = 0.05
"""Estimates that differ by less than this share count as equal; the simpler layout is taken."""

_MOST_SPLITS = 64
"""Ways to divide the nodes between trainer and engines that are looked at."""


@dataclass(frozen=True)
class Recommendation:
    """The layout to use, or the one that lacks least."""

    best: Estimate
    why: str
    other: Estimate | None = None
    """The best layout with the other ``rollout.steps_ahead``, where there is one that fits."""


def recommend(run: PlannedRun, gpus: int) -> Recommendation:
    """Rank every layout of a number of GPUs by its expected seconds per step.

    Tensor parallelism stays within a node, sequence parallelism goes with it, the optimizer is
    sharded wherever there are replicas. Recomputation is looked at for layouts that do not fit
    without, offloading if no layout fits. Engines are either colocated, each GPU belonging to one,
    or have whole nodes of their own. Everything else is as configured, ``rollout.steps_ahead``
    (which changes what is learnt, not only how fast) and ``train.tokens_per_micro_batch`` among it;
    the best layout with the other ``steps_ahead`` is named beside. Of layouts whose estimates
    differ by less than 5 % the one with the fewest options and the least parallelism is taken.

    Raises:
        ConfigError: the trainer would accept no layout of so many GPUs.
    """
    ahead = run.rollout.steps_ahead
    asked = _estimates(run, gpus, ahead)
    other = _estimates(run, gpus, 0 if ahead else 1)
    fitting = [e for e in other if e.fits]
    beside = _fastest(fitting)[0] if fitting else None
    estimates = asked or other
    if not estimates:
        raise ConfigError(
            f"No layout of {gpus} GPUs divides the two models and the "
            f"{run.work.trajectories} trajectories of a step. Choose another number of GPUs."
        )
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        return Recommendation(*_nearest(estimates), beside)
    best, which = _fastest(fitting)
    why = f"{which} of {len(fitting)} layouts that fit, of {len(estimates)} possible"
    return Recommendation(best, why, beside if asked else None)


def _estimates(run: PlannedRun, gpus: int, ahead: Literal[0, 1]) -> list[Estimate]:
    """Every layout that the trainer accepts; with offloading if none fits without."""
    kept = _every_layout(run, gpus, ahead, offload=False)
    if not kept or any(e.fits for e in kept):
        return kept
    away = _every_layout(run, gpus, ahead, offload=True)
    return [min(pair, key=lambda e: (not e.fits, e.peak)) for pair in zip(kept, away, strict=True)]


def _nearest(estimates: list[Estimate]) -> tuple[Estimate, str]:
    nearest = min(estimates, key=lambda e: e.peak)
    return nearest, (
        f"none of {len(estimates)} layouts fits; this one needs least: {nearest.obstacle}. Take "
        "more GPUs, or lower train.tokens_per_micro_batch and rollout.max_new_tokens"
    )


def _fastest(fitting: list[Estimate]) -> tuple[Estimate, str]:
    """The simplest of the layouts that are as fast as the fastest, and which that is."""
    fastest = min(fitting, key=lambda e: e.seconds.total)
    limit = fastest.seconds.total * (1 + _EQUAL)
    equal = [e for e in fitting if e.seconds.total <= limit]
    best = min(equal, key=lambda e: (_complexity(e.run), e.seconds.total))
    if best is fastest:
        return best, "the fastest"
    slower = 100 * (best.seconds.total / fastest.seconds.total - 1)
    return best, (
        f"within {slower:.1f} % of the fastest ({layout_name(fastest.run)}) and simpler, "
        "hence taken,"
    )


def _complexity(run: PlannedRun) -> tuple[bool, int, int]:
    p = run.parallel
    # Last, how many ranks a replica's weights are spread over.
    return (
        run.separate,
        effort(run.options),
        p.pipeline * max(p.tensor, p.shards_of_expert * p.expert),
    )


def _every_layout(
    run: PlannedRun, gpus: int, ahead: Literal[0, 1], *, offload: bool
) -> list[Estimate]:
    """Every layout that the trainer accepts, with the engines that sample fastest beside it."""
    estimates = []
    if not ahead or run.hardware.layers == "cpu":
        engines = _colocated(run, gpus, ahead)
        estimates += _with_engines(run, gpus, engines, offload=offload)
    node = run.hardware.gpus_per_node
    all_nodes = gpus // node if gpus % node == 0 else 1
    step = -(-all_nodes // _MOST_SPLITS)
    for nodes in range(step, all_nodes, step):
        engines = _apart(run, nodes, ahead)
        estimates += _with_engines(run, gpus - nodes * node, engines, offload=offload)
    return estimates


def _with_engines(
    run: PlannedRun, gpus: int, engines: list[RolloutConfig], *, offload: bool
) -> list[Estimate]:
    """Every layout of the trainer's GPUs, with the best of the engines that it leaves room for."""
    laid_out = list(_laid_out(run, gpus, engines[0]))
    if not laid_out:
        return []
    # How fast engines are depends on them alone, not on how the trainer is laid out.
    timed = [(rollout, rollout_seconds(one)) for rollout, one in _usable(laid_out[0], engines)]
    return [_with_options(one, timed, offload=offload) for one in laid_out]


def _with_options(
    one: PlannedRun, timed: list[tuple[RolloutConfig, float]], *, offload: bool
) -> Estimate:
    """A layout with as little recomputation and offloading as it needs."""
    looked_at = []
    for ways in _ways(one, offload=offload):
        runs = [replace(one, options=options) for options in ways]
        estimates = [estimate(replace(s, rollout=_best_engines(s, timed))) for s in runs]
        if fitting := [e for e in estimates if e.fits]:
            return _fastest(fitting)[0]
        looked_at += estimates
    return min(looked_at, key=lambda e: e.peak)


def _ways(one: PlannedRun, *, offload: bool) -> list[list[Options]]:
    """Nothing recomputed, then as little as fits; or what can be offloaded."""
    shape, plain = one.student.shape, replace(one.options, recompute=Recompute())
    layers, mixture = stage_sizes(shape.layers, one.parallel.pipeline)[0], bool(shape.experts)
    if offload and one.hardware.layers != "cpu":
        sharded = one.parallel.distributed_optimizer
        return [offloading(plain, mixture=mixture, sharded=sharded) or [plain]]
    return [[plain], recomputing(plain, layers=layers, mixture=mixture)]


def _usable(
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


def _best_engines(one: PlannedRun, timed: list[tuple[RolloutConfig, float]]) -> RolloutConfig:
    """The engines that sample fastest in what the trainer leaves: the smallest that are as fast."""
    free = one.hardware.usable_bytes
    if not one.separate:
        free -= max(stage.resident for stage in fullest_stages(one))
    best, least = one.rollout, float("inf")
    for rollout, took in timed:
        if (
            took < least * (1 - _EQUAL)
            and engine_memory(replace(one, rollout=rollout)).total <= free
        ):
            best, least = rollout, took
    return best


def _laid_out(run: PlannedRun, gpus: int, rollout: RolloutConfig) -> Iterator[PlannedRun]:
    """Every layout of the trainer's GPUs that it accepts."""
    for parallel in _layouts(run, gpus):
        try:
            yield run.laid_out(parallel, rollout)
        except ConfigError:
            continue


def _layouts(run: PlannedRun, gpus: int) -> Iterator[ParallelConfig]:
    shapes = [model.shape for model in run.models]
    mixture = any(shape.experts for shape in shapes)
    for tensor in _divisors(gpus):
        if tensor > run.hardware.gpus_per_node or run.hardware.gpus_per_node % tensor:
            continue
        for pipeline in _divisors(gpus // tensor):
            data = gpus // tensor // pipeline
            if pipeline > min(s.layers for s in shapes) or run.work.trajectories % data:
                continue
            for expert, expert_tensor in _expert_layouts(tensor, data) if mixture else [(1, None)]:
                yield ParallelConfig(
                    tensor=tensor,
                    pipeline=pipeline,
                    data=data,
                    expert=expert,
                    expert_tensor=expert_tensor,
                    uneven_stages=any(shape.layers % pipeline for shape in shapes),
                    sequence_parallel=tensor > 1,
                    distributed_optimizer=data > 1,
                )


def _expert_layouts(tensor: int, data: int) -> Iterator[tuple[int, int | None]]:
    """(expert, expert_tensor): experts sharded like everything else, and whole."""
    yield from ((expert, None) for expert in _divisors(data))
    if tensor > 1:
        yield from ((expert, 1) for expert in _divisors(tensor * data))


def _colocated(run: PlannedRun, gpus: int, ahead: Literal[0, 1]) -> list[RolloutConfig]:
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
        for size in _divisors(min(gpus, run.hardware.gpus_per_node))
        for share in _SHARES
    ]


def _apart(run: PlannedRun, nodes: int, ahead: Literal[0, 1]) -> list[RolloutConfig]:
    """Each GPU of some nodes belongs to one engine, which has what is not reserved."""
    node, reserve = run.hardware.gpus_per_node, run.hardware.reserve
    engines = replace(run.rollout, placement="separate", steps_ahead=ahead)
    if run.hardware.layers == "cpu":
        return [replace(engines, num_engines=nodes * node, engine_tensor_parallel=1)]
    share = max((share for share in _SHARES if share <= 1 - reserve), default=_SHARES[0])
    engines = replace(engines, engine_gpu_share=share)
    return [
        replace(engines, num_engines=nodes * node // size, engine_tensor_parallel=size)
        for size in _divisors(node)
    ]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
