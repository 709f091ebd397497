"""What a cluster is made of: published peaks, and the shares of them that runs reach."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.text_files import read_toml
from megatron_tropd.config import settings_from_table
from megatron_tropd.config.settings import (
    Count,
    Positive,
    Range,
    Settings,
    Share,
    check_value,
)

Reserve = Annotated[float, Range(0, 1, "()", "reserve = 1 leaves no memory.")]
Layers = Literal["transformer_engine", "local", "cpu"]
"""Whose layers run: Transformer Engine's, Megatron's own on a GPU, Megatron's own on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Hardware(Settings):
    """One kind of GPU (or CPU) and its links. Bytes and seconds are decimal: 1 GB = 10^9 bytes."""

    name: str
    memory_gb: Positive
    """Memory of one GPU."""
    tflops: Positive
    """Peak dense bf16 rate of one GPU, 10^12 FLOP/s."""
    memory_gb_s: Positive
    """Peak bandwidth of its memory."""
    intra_node_gb_s: Positive
    """Peak of its links within a node, in one direction."""
    network_gb_s: Positive
    """Peak of its share of the network, in one direction."""
    gpus_per_node: Count = 8
    achieved_flops: Share = 0.4
    """Share of ``tflops`` that large matrix products reach in training. An assumption."""
    achieved_flops_experts: Share = 0.2
    """The same for the small products of experts. An assumption."""
    achieved_bandwidth: Share = 0.6
    """Share of every bandwidth that is reached. An assumption."""
    host_copy_gb_s: Positive = 5.0
    """From a GPU to a file in shared memory, or back: one thread copies. An assumption."""
    host_link_gb_s: Positive = 32.0
    """Peak between one GPU and the host's memory, in one direction (PCIe)."""
    host_memory_gb: Positive = 2000.0
    """Memory of a node's own, for what is offloaded and for checkpoints on their way."""
    host_memory_gb_s: Positive = 40.0
    """What one rank's Adam on the host reaches of its memory's bandwidth. An assumption."""
    shared_folder_gb_s: Positive = 2.0
    """What one node writes to the run's folder, which all nodes see, or reads. An assumption."""
    decode_overhead_ms: Positive = 3.0
    """Time of one decoding step beside reading weights and cache. An assumption."""
    hop_us: Positive = 10.0
    """Latency of one collective within a node. An assumption."""
    reserve: Reserve = 0.08
    """Share of the memory for contexts, NCCL's buffers and fragmentation. An assumption."""
    layers: Layers = "transformer_engine"
    """Whose layers the trainer runs."""

    def _check_field(self, name: str, hint: Any) -> None:
        check_value(hint, getattr(self, name), f"Hardware {self.name}: {name}")

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU less the reserve."""
        return self.memory_gb * 1e9 * (1 - self.reserve)

    @property
    def flops(self) -> float:
        """Reached FLOP/s of one GPU."""
        return self.tflops * 1e12 * self.achieved_flops

    @property
    def expert_flops(self) -> float:
        """Reached FLOP/s of one GPU in the products of experts."""
        return self.tflops * 1e12 * self.achieved_flops_experts

    @property
    def memory_bandwidth(self) -> float:
        """Reached bytes/s of one GPU's memory."""
        return self.memory_gb_s * 1e9 * self.achieved_bandwidth

    @property
    def host_link(self) -> float:
        """Reached bytes/s between one GPU and the host's memory."""
        return self.host_link_gb_s * 1e9 * self.achieved_bandwidth

    def link(self, neighbours: int) -> float:
        """Reached bytes/s between ranks of a group that spans ``neighbours`` adjacent ranks."""
        peak = self.intra_node_gb_s if neighbours <= self.gpus_per_node else self.network_gb_s
        return peak * 1e9 * self.achieved_bandwidth


# NVIDIA's data sheets of the SXM parts: dense bf16 without sparsity; NVLink's figure and PCIe's
# (Gen4 x16 for the A100, Gen5 x16) count both directions and are halved here. The network is a
# choice of the cluster: one adapter of 400 Gb/s (A100: 200 Gb/s) for each GPU, as in NVIDIA's own
# DGX systems, which have 2 TB of memory of their own.
_A100 = Hardware(
    name="a100",
    memory_gb=80,
    tflops=312,
    memory_gb_s=2039,
    intra_node_gb_s=300,
    network_gb_s=25,
)
_H100 = Hardware(
    name="h100",
    memory_gb=80,
    tflops=989,
    memory_gb_s=3350,
    intra_node_gb_s=450,
    network_gb_s=50,
    host_link_gb_s=64,
)
_H200 = replace(_H100, name="h200", memory_gb=141, memory_gb_s=4800)
GPUS = {preset.name: preset for preset in (_A100, _H100, _H200)}
"""By name; :func:`load_hardware` takes these names."""


def load_hardware(name_or_path: str) -> Hardware:
    """A preset by its name, or a TOML file with the fields of :class:`Hardware`.

    A file may name a preset as ``like`` and then needs only what differs.

    Raises:
        ConfigError: no such preset or file, an unknown or missing field, an impossible value.
    """
    if name_or_path in GPUS:
        return GPUS[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        raise ConfigError(
            f"Hardware {name_or_path!r} is neither one of {', '.join(GPUS)} nor a TOML file. "
            "Give one of them."
        )
    return _from_table(read_toml(path, "Hardware file"), path)


def _from_table(table: dict[str, Any], path: Path) -> Hardware:
    like = table.pop("like", None)
    if like is not None and like not in list(GPUS):
        raise ConfigError(f"{path}: like must be one of {', '.join(GPUS)}, found {like!r}.")
    base = {} if like is None else vars(GPUS[like])
    try:
        return settings_from_table(Hardware, {"name": path.stem} | base | table)
    except ConfigError as error:
        raise ConfigError(
            f"Hardware file {path}: {error} like = a preset's name fills in what is left out."
        ) from None
