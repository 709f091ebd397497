"""One layout's memory, communication and time together."""

from dataclasses import dataclass

from megatron_tropd.planning.communication import Communication, communication
from megatron_tropd.planning.memory import Memory, fits, memory
from megatron_tropd.planning.seconds import Seconds, seconds
from megatron_tropd.planning.setup import Setup


@dataclass(frozen=True)
class Estimate:
    """What a layout needs and takes."""

    made: Setup
    memory: list[Memory]
    """Of each pipeline stage."""
    communication: Communication
    seconds: Seconds
    fits: bool

    @property
    def peak(self) -> float:
        """Bytes on the fullest GPU."""
        return max(stage.peak for stage in self.memory)


def estimate(made: Setup) -> Estimate:
    """Everything about one layout; arithmetic only."""
    stages, sent = memory(made), communication(made)
    return Estimate(made, stages, sent, seconds(made, sent), fits(made, stages))


def layout_name(made: Setup) -> str:
    """A layout and its engines in one line."""
    p, rollout = made.parallel, made.rollout
    parts = [f"TP {p.tensor} x PP {p.pipeline} x DP {p.data}"]
    if p.expert > 1:
        parts.append(f"EP {p.expert}")
    for name in ("uneven_stages", "sequence_parallel", "distributed_optimizer"):
        if getattr(p, name):
            parts.append(name.replace("_", " "))
    gpus = rollout.engine_tensor_parallel
    engines = f"{rollout.num_engines} engine{'s' if rollout.num_engines > 1 else ''}"
    if made.separate:
        engines = engines.replace("engine", "server")
    of_gpus = f"{gpus} GPU{'s' if gpus > 1 else ''}" + (" of their own" if made.separate else "")
    parts.append(f"{engines} of {of_gpus}, engine_memory {rollout.engine_memory:.2f}")
    return ", ".join(parts)
