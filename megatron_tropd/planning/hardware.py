"""What a cluster is made of: published peaks, and the shares of them that runs reach."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.errors import ConfigError
from megatron_tropd.text_files import read_toml

Layers = Literal["transformer_engine", "local", "cpu"]
"""Whose layers run: Transformer Engine's, Megatron's own on a GPU, Megatron's own on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU (or CPU) and its links. Bytes and seconds are decimal: 1 GB = 10^9 bytes."""

    name: str
    memory_gb: float
    """Memory of one GPU."""
    tflops: float
    """Peak dense bf16 rate of one GPU, 10^12 FLOP/s."""
    memory_gb_s: float
    """Peak bandwidth of its memory."""
    intra_node_gb_s: float
    """Peak of its links within a node, in one direction."""
    network_gb_s: float
    """Peak of its share of the network, in one direction."""
    gpus_per_node: int = 8
    achieved_flops: float = 0.4
    """Share of ``tflops`` that large matrix products reach in training. An assumption."""
    achieved_flops_experts: float = 0.2
    """The same for the small products of experts. An assumption."""
    achieved_bandwidth: float = 0.6
    """Share of every bandwidth that is reached. An assumption."""
    host_copy_gb_s: float = 5.0
    """From a GPU to a file in shared memory, or back: one thread copies. An assumption."""
    shared_folder_gb_s: float = 2.0
    """What one node writes to the run's folder, which all nodes see, or reads. An assumption."""
    decode_overhead_ms: float = 3.0
    """Time of one decoding step beside reading weights and cache. An assumption."""
    hop_us: float = 10.0
    """Latency of one collective within a node. An assumption."""
    reserve: float = 0.08
    """Share of the memory for contexts, NCCL's buffers and fragmentation. An assumption."""
    layers: Layers = "transformer_engine"
    """Whose layers the trainer runs."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 < value < float("inf"):
                raise ConfigError(
                    f"Hardware {self.name}: {field.name} must be above 0 and finite, found "
                    f"{value}. Correct it."
                )
        for name in ("achieved_flops", "achieved_flops_experts", "achieved_bandwidth", "reserve"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"Hardware {self.name}: {name} is a share and must be at most 1, found "
                    f"{getattr(self, name)}. Correct the TOML file."
                )

        if self.reserve == 1:
            raise ConfigError(f"Hardware {self.name}: reserve = 1 leaves no memory. Lower it.")

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

    def link(self, neighbours: int) -> float:
        """Reached bytes/s between ranks of a group that spans ``neighbours`` adjacent ranks."""
        peak = self.intra_node_gb_s if neighbours <= self.gpus_per_node else self.network_gb_s
        return peak * 1e9 * self.achieved_bandwidth


# NVIDIA's data sheets of the SXM parts: dense bf16 without sparsity; NVLink's figure counts both
# directions and is halved here. The network is a choice of the cluster: one adapter of 400 Gb/s
# (A100: 200 Gb/s) for each GPU, as in NVIDIA's own DGX systems.
PRESETS = {
    preset.name: preset
    for preset in (
        Hardware(
            name="a100",
            memory_gb=80,
            tflops=312,
            memory_gb_s=2039,
            intra_node_gb_s=300,
            network_gb_s=25,
        ),
        Hardware(
            name="h100",
            memory_gb=80,
            tflops=989,
            memory_gb_s=3350,
            intra_node_gb_s=450,
            network_gb_s=50,
        ),
        Hardware(
            name="h200",
            memory_gb=141,
            tflops=989,
            memory_gb_s=4800,
            intra_node_gb_s=450,
            network_gb_s=50,
        ),
    )
}
"""By name; :func:`load_hardware` takes these names."""


def load_hardware(name_or_path: str) -> Hardware:
    """A preset by its name, or a TOML file with the fields of :class:`Hardware`.

    A file may name a preset as ``like`` and then needs only what differs.

    Raises:
        ConfigError: no such preset or file, an unknown or missing field, an impossible value.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        raise ConfigError(
            f"Hardware {name_or_path!r} is neither one of {', '.join(PRESETS)} nor a TOML file. "
            "Give one of them."
        )
    return _from_table(read_toml(path, "Hardware file"), path)


def _from_table(table: dict[str, Any], path: Path) -> Hardware:
    like = table.pop("like", None)
    if like is not None and like not in list(PRESETS):
        raise ConfigError(f"{path}: like must be one of {', '.join(PRESETS)}, found {like!r}.")
    known = {field.name: field for field in fields(Hardware)}
    if unknown := sorted(table.keys() - known.keys()):
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}. Known: {', '.join(known)}, like.")
    base = {} if like is None else vars(PRESETS[like])
    values = {"name": path.stem} | base | table
    needed = ("memory_gb", "tflops", "memory_gb_s", "intra_node_gb_s", "network_gb_s")
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(
            f"{path} misses {', '.join(missing)}. Add them or like = a preset's name."
        )
    for name, value in values.items():
        _check_type(name, value, path)
    return Hardware(**values)


def _check_type(name: str, value: Any, path: Path) -> None:
    if name == "layers":
        good = value in Layers.__args__  # type: ignore[attr-defined]
        expected = f"one of {', '.join(Layers.__args__)}"  # type: ignore[attr-defined]
    elif name == "name":
        good, expected = isinstance(value, str), "text"
    elif name == "gpus_per_node":
        good, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        good, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    if not good:
        raise ConfigError(f"{path}: {name} must be {expected}, found {value!r}.")
