"""One layout's memory, communication and time together."""

from dataclasses import dataclass
from functools import cached_property

from megatron_tropd.config import ParallelConfig
from megatron_tropd.planning.communication import Communication, communication
from megatron_tropd.planning.memory import Memory, fullest_stages, memory, obstacle
from megatron_tropd.planning.options import describe_options
from megatron_tropd.planning.planned_run import PlannedRun
from megatron_tropd.planning.seconds import Seconds, seconds


@dataclass(frozen=True)
class Estimate:
    """What a layout needs and takes."""

    run: PlannedRun
    peak: float
    """Bytes on the fullest training GPU."""
    obstacle: str
    """Why it does not fit; empty if it does."""

    @property
    def fits(self) -> bool:
        """Whether every GPU holds what it must."""
        return not self.obstacle

    @cached_property
    def communication(self) -> Communication:
        """Bytes that a GPU sends."""
        return communication(self.run)

    @cached_property
    def seconds(self) -> Seconds:
        """Of the phases of a step."""
        return seconds(self.run, self.communication)

    @cached_property
    def memory(self) -> list[Memory]:
        """Of each pipeline stage."""
        return memory(self.run)


def slow_phases(one: Estimate) -> list[str]:
    """A warning for each phase that the run would take to hang (``run.timeout_minutes``)."""
    took, minutes = one.seconds, one.run.config.run.timeout_minutes
    phases = {name: getattr(took, name) for name in ("teacher", "student", "optimizer", "sync")}
    phases["rollout"] = took.waiting
    return [
        f"the {phase} is estimated, not calibrated, to last {length / 60:.1f} minutes; "
        f"a run is taken to hang after run.timeout_minutes = {minutes:g}. "
        f"Set that to {2 * length / 60:.0f} or more"
        for phase, length in phases.items()
        if length > 60 * minutes
    ]


def estimate(run: PlannedRun, fullest: list[Memory] | None = None) -> Estimate:
    """Everything about one layout; arithmetic only.

    Args:
        fullest: its stages that may be the fullest, if they are known.
    """
    fullest = fullest or fullest_stages(run)
    return Estimate(
        run,
        peak=max(stage.peak for stage in fullest),
        obstacle=obstacle(run, fullest),
    )


def layout_name(run: PlannedRun) -> str:
    """A layout and its engines in one line."""
    rollout, parts = run.rollout, _axes(run.parallel)
    if run.elsewhere:
        parts.append(f"teacher ({', '.join(_axes(run.scoring.parallel))})")
    parts += describe_options(run.options)
    gpus = rollout.engine_tensor_parallel
    engines = f"{_many(rollout.num_engines, 'engine')} of {_many(gpus, 'GPU')}"
    if run.separate:
        engines += f" on {_many(run.engine_nodes, 'node')} of their own"
    on_cpu = run.hardware.layers == "cpu"
    name = "engine_cpu_kv_gib" if on_cpu else "engine_gpu_share"
    parts.append(f"{engines}, {name} {getattr(rollout, name):.2f}")
    if rollout.steps_ahead:
        parts.append("one step ahead")
    return ", ".join(parts)


def _axes(p: ParallelConfig) -> list[str]:
    context = f" x CP {p.context}" if p.context > 1 else ""
    virtual = f" (VPP {p.virtual_pipeline})" if p.virtual_pipeline > 1 else ""
    parts = [f"TP {p.tensor}{context} x PP {p.pipeline}{virtual} x DP {p.data}"]
    if p.expert > 1:
        parts.append(f"EP {p.expert}")
    if p.shards_of_expert < p.tensor:
        parts.append("whole experts")
    for name in ("uneven_stages", "sequence_parallel", "distributed_optimizer"):
        if getattr(p, name):
            parts.append(name.replace("_", " "))
    return parts


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
