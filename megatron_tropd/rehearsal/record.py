"""What a rehearsed rank reports, as plain values."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PhaseBytes:
    """Memory of one phase of a step, in bytes of the device."""

    name: str
    peak: int
    """Most that is alive at a time."""
    end: int
    """What is left when the phase is over."""
    planned: float | None
    """The planner's peak, without the rollout engine; None: it plans no such phase."""
    makers: list[tuple[str, int]]
    """Line -> bytes alive near the peak that it made; the largest."""

    @property
    def difference(self) -> float | None:
        """Share by which the rehearsal is above the plan."""
        return None if not self.planned else self.peak / self.planned - 1


@dataclass(frozen=True)
class EventCount:
    """Equal events of one phase."""

    phase: str
    what: str
    """The operation."""
    count: int
    """In the whole step."""
    line: str = ""
    """Of a wait: where; of a collective: empty."""
    group: str = ""
    """Of a collective: Megatron's name of its ranks."""
    size: int = 0
    """Ranks of the group."""
    bytes: int = 0
    """Of one call: what this rank gives, or receives if it gives nothing."""
    device: str = ""
    """Of a collective: "cuda", or "cpu" between hosts."""


@dataclass(frozen=True)
class RankReport:
    """One rank's step."""

    rank: int
    stage: int
    tensor_rank: int
    data_rank: int
    context_rank: int
    micro_batches: int
    """Of the step, on this rank."""
    run_micro_batches: int
    """How many of them were run; the others are counted like the last of these."""
    phases: list[PhaseBytes]
    collectives: list[EventCount]
    waits: list[EventCount]
    kernels: list[EventCount]
    """Launches of Triton kernels."""
    engine_bytes: int
    """New weights that reach this rank on their way to a rollout engine."""
    engine_buffers: int
    """Buffers that the engine which this rank owns reads them from, on its GPUs."""
    checkpoint_bytes: int
    """Tensors that this rank writes to a checkpoint."""
    host_peak: int
    """Most bytes of large tensors of the host."""
    seconds: float
    """That the rehearsal of this rank took, and of them the processor's."""
    cpu_seconds: float
    resident_bytes: int
    """Peak memory of the process that rehearsed."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> "RankReport":
        """From the JSON of :meth:`values`."""
        counts = {
            name: [EventCount(**one) for one in values[name]]
            for name in ("collectives", "waits", "kernels")
        }
        phases = [
            PhaseBytes(**one | {"makers": [(line, size) for line, size in one["makers"]]})
            for one in values["phases"]
        ]
        return cls(**values | counts | {"phases": phases})

    def values(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What a process is asked to rehearse."""

    config: dict[str, Any]
    rank: int
    prompt_tokens: int
    gpus_per_node: int
    micro_batches: int | None = None
    """To run; None: as many as fill the pipeline, and one more."""
    context_tokens: int | None = None
    """Of what a teacher reads in a prompt's place; None: the longest."""
