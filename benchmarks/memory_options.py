"""What it costs to save memory: recomputation, context parallelism, offloading, adapters.

    python benchmarks/memory_options.py [--rounds N] [--steps N] [--samples N] [--tokens N]

A step without its rollout (the teacher scores, the student runs forward and backward with exact
TrOPD, the optimizer steps) of a Qwen3 pair with random weights in fp32, on ranks of one thread
each. Every round runs every row afresh; the first step of a run is dropped, the rest are pooled
into medians. *time* is the ranks' time of a step, ranks x seconds, over that of the first row. What
is saved ``tropd plan`` says; resident memory, which the file has too, keeps what was freed.
On a machine with too few cores for two ranks their time includes the wait for each other.

The result goes to ``benchmarks/results/memory-options-<hardware>.json``.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_step import draw_weights, random_sequences
from step import REPOSITORY, commit, describe_hardware, our_packages
from transformers import Qwen3Config

from megatron_tropd.config import (
    Config,
    GuidanceConfig,
    LoraConfig,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_tropd.config.loss import preset

VOCAB = 4096
SIZES = {"student": (256, 8), "teacher": (512, 8)}
"""Hidden size and layers."""


@dataclass(frozen=True)
class Row:
    """One way to run the step."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's TransformerConfig."""
    offload: str = "none"
    lora: LoraConfig | None = None

    @property
    def ranks(self) -> int:
        """How many."""
        return self.parallel.tensor * self.parallel.context * self.parallel.data


def _whole_layers(count: int) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": count,
    }


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


ROWS = {
    "nothing": Row(),
    "core attention recomputed": Row(model=_selective("core_attn")),
    "MLPs recomputed": Row(model=_selective("mlp")),
    "half of the layers recomputed": Row(model=_whole_layers(SIZES["student"][1] // 2)),
    "all layers recomputed": Row(model=_whole_layers(SIZES["student"][1])),
    "teacher in host memory": Row(offload="host"),
    "teacher in host memory, by layer": Row(offload="host_by_layer"),
    "adapters of rank 16": Row(lora=LoraConfig(rank=16)),
    "two replicas": Row(ParallelConfig(data=2)),
    "CP 2": Row(ParallelConfig(context=2)),
    "TP 2, sequence parallel": Row(ParallelConfig(tensor=2, sequence_parallel=True)),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="of a run, beside the first")
    add("--samples", type=int, default=4, help="of a step")
    add("--tokens", type=int, default=960, help="new ones of a sample, after 64 of the prompt")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for number in range(options.rounds):
        for name in ROWS:
            found[name].append(one_run(name, options))
            print(number, name, found[name][-1], flush=True)
    slug, hardware = describe_hardware()
    result = {
        "command": " ".join(["python benchmarks/memory_options.py", *sys.argv[1:]]),
        "settings": vars(options) | {"sizes": SIZES, "vocab": VOCAB},
        "hardware": hardware,
        "versions": {name: version(name) for name in our_packages()},
        "commit": commit(),
        "rows": summarise(found),
    }
    path = REPOSITORY / "benchmarks" / "results" / f"memory-options-{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))


def one_run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of its steps, bytes and losses, of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (name, options, folder)
        mp.spawn(_work, args=arguments, nprocs=ROWS[name].ranks)
        return json.loads((Path(folder) / "found.json").read_text())


def _work(rank: int, name: str, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    row, store = ROWS[name], f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=row.ranks)
    found = measure(row, options)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The same on every rank."""
    from megatron_tropd.distill.pair import step_parts
    from megatron_tropd.distill.step import learn
    from megatron_tropd.mcore import dense, parallel, platform

    platform.prepare_platform()
    layout = parallel.initialize(row.parallel, seed=1)
    folders: dict[str, Any] = {
        who: SimpleNamespace(config=_config(*sizes)) for who, sizes in SIZES.items()
    }
    with patch.object(dense, "load_weights", draw_weights):
        parts = step_parts(run_config(row, options), folders, layout)
    seconds, losses, peak = [], [], 0
    for step in range(options.steps + 1):
        sequences = random_sequences(options, VOCAB, step)
        resting = _reset_peak()
        dist.barrier()
        start = time.perf_counter()
        losses.append(learn(parts, sequences, step).metrics["loss"])
        seconds.append(time.perf_counter() - start)
        peak = _status("VmHWM") - resting
    return {"seconds": seconds[1:], "bytes": peak, "losses": losses}


def run_config(row: Row, options: argparse.Namespace) -> Config:
    """The run's configuration."""
    length = options.tokens + 64
    return Config(
        model=ModelConfig(student="student", teacher="teacher", lora=row.lora),
        rollout=RolloutConfig(prompts="none", max_new_tokens=options.tokens),
        guidance=GuidanceConfig(beta=0.0),
        loss=preset("tropd_exact"),
        parallel=row.parallel,
        teacher=TeacherConfig(offload=row.offload),
        megatron=MegatronConfig(model=row.model),
        train=TrainConfig(
            steps=options.steps + 1, lr=1e-5, tokens_per_micro_batch=2 * length, seed=7
        ),
        run=RunConfig(dir="."),
    )


def _config(hidden: int, layers: int) -> dict[str, Any]:
    """The config.json of a model."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 128, 2),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
    )
    return config.to_dict()


def _reset_peak() -> int:
    """Forget the process's peak of resident memory; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of each row, and what they are of the first row's."""
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        rows[name] = {
            "ranks": ROWS[name].ranks,
            "seconds": statistics.median(s for run in runs for s in run["seconds"]),
            "gib": statistics.median(run["bytes"] for run in runs) / 2**30,
            "losses": runs[0]["losses"],
        }
    first = rows["nothing"]
    for row in rows.values():
        row["time"] = row["ranks"] * row["seconds"] / first["seconds"]
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | ranks | seconds a step | time |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['ranks']} | {row['seconds']:.2f} | {row['time']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
