"""How long training stands still for a checkpoint: written at once, and in the background.

    python benchmarks/checkpoint.py [--layers N] [--hidden N] [--rounds N] [--folder DIR]
        [--sharding fully_reshardable|dp_reshardable]

Two gloo ranks (tensor parallel; with ``--sharding`` two replicas that share an optimizer) train a
random Llama in fp32 with Adam on random tokens and save it. *at once*: a step, a save, waiting for
it. *background*: a step, the start of a save, then steps with a poll after each until the
checkpoint is complete. Both in every round; medians of rank 0. Writing takes its share of the cores
and the disk: the steps meanwhile are counted too.

The result goes to ``benchmarks/results/checkpoint[-<sharding>]-<hardware>.json``.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import REPOSITORY, commit, describe_hardware, our_packages
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_tropd.config import ParallelConfig, TrainConfig
from megatron_tropd.data.packing import pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer

RANKS = 2
TRAIN = TrainConfig(steps=10_000, lr=1e-3, tokens_per_micro_batch=512)


def trajectories(step: int, vocab: int) -> list[TokenSequence]:
    """Eight random sequences of 64 tokens."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocab, (8, 64), generator=generator).tolist()
    return [
        TokenSequence.of_runs(
            SampleKey(step, i, 0),
            (Writer.CONTEXT, tuple(row[:8])),
            (Writer.STUDENT, tuple(row[8:])),
            logprobs=(-1.0,) * 56,
            version=step,
            finish="length",
        )
        for i, row in enumerate(ids)
    ]


class Training:
    """A student that takes steps and saves."""

    def __init__(self, model: Path, folder: Path, sharding: str | None) -> None:
        from megatron_tropd.convert.families import model_shape
        from megatron_tropd.convert.hf_folder import HFFolder
        from megatron_tropd.mcore import models, parallel, platform
        from megatron_tropd.mcore.checkpoint import Checkpoints
        from megatron_tropd.mcore.student import Student

        platform.prepare_platform()
        sizes, source = ParallelConfig(tensor=RANKS), HFFolder(model)
        if sharding:
            sizes = ParallelConfig(data=RANKS, distributed_optimizer=True)
        self._sharding = {"sharding": sharding} if sharding else {}
        self.layout = parallel.initialize(sizes, seed=1)
        self._vocab = model_shape(source.config).vocab
        shared = {"parallel": sizes, "dtype": torch.float32}
        padded = models.padded_vocab_size(source.config, tensor=sizes.tensor)
        network = models.build_model(source, layout=self.layout, padded_vocab_size=padded, **shared)
        self._student = Student(network, train=TRAIN, **shared)
        self._checkpoints = Checkpoints(
            folder, keep=1, layout=self.layout, distributed_optimizer=sizes.distributed_optimizer
        )
        self._steps = 0

    def step(self) -> float:
        """Seconds of an optimizer step."""
        from megatron_tropd.mcore.schedule import cross_entropy

        place = {"dp_rank": self.layout.dp_rank, "dp_size": self.layout.dp_size}
        given = trajectories(self._steps, self._vocab)
        batches = pack(given, **place, tokens_per_micro_batch=512, seed=0, step=0)
        start = time.perf_counter()
        self._student.forward_backward(batches, cross_entropy)
        self._student.update()
        self._steps += 1
        return time.perf_counter() - start

    def round(self) -> dict[str, float]:
        """Seconds of one save of each kind and of the steps around it."""
        alone = statistics.median(self.step() for _ in range(3))
        start = time.perf_counter()
        self._save()
        self._checkpoints.wait()
        at_once = time.perf_counter() - start

        self.step()
        begun = time.perf_counter()
        self._save()
        standing, slowed = time.perf_counter() - begun, 0.0
        target, longest_poll, steps = self._steps, 0.0, 0
        while target not in self._checkpoints.steps():
            slowed += self.step() - alone
            steps += 1
            start = time.perf_counter()
            self._checkpoints.poll()
            poll = time.perf_counter() - start
            longest_poll, standing = max(longest_poll, poll), standing + poll
        return {
            "step": alone,
            "at_once": at_once,
            "background_standing_still": standing,
            "background_longest_poll": longest_poll,
            "background_steps_slower_by": slowed,
            "background_until_complete": time.perf_counter() - begun,
            "background_steps_meanwhile": steps,
        }

    def _save(self) -> None:
        self._checkpoints.save(self._student, step=self._steps, extra={}, **self._sharding)


def work(rank: int, model: str, folder: str, rounds: int, sharding: str | None) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    training = Training(Path(model), Path(folder) / "checkpoints", sharding)
    training.round()  # the first save makes what later ones find
    measured = [training.round() for _ in range(rounds)]
    if rank == 0:
        (Path(folder) / "rounds.json").write_text(json.dumps(measured))


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sharding", choices=["fully_reshardable", "dp_reshardable"])
    parser.add_argument("--folder", type=Path, default=None, help="default: the temporary folder")
    arguments = parser.parse_args()
    slug, hardware = describe_hardware()
    sharding = arguments.sharding or ""
    hardware["load_average_before"] = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=4 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            vocab_size=8192,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(Path(scratch) / "model")
        mp.spawn(
            work,
            (str(Path(scratch) / "model"), scratch, arguments.rounds, arguments.sharding),
            nprocs=RANKS,
        )
        measured = json.loads((Path(scratch) / "rounds.json").read_text())
        size = sum(p.stat().st_size for p in (Path(scratch) / "checkpoints").rglob("*.distcp"))
        disk = shutil.disk_usage(scratch).free / 2**30
    result: dict[str, Any] = {
        "hardware": hardware | {"free_gib": round(disk, 1)},
        "command": "python benchmarks/checkpoint.py" + (sharding and f" --sharding {sharding}"),
        **commit(),
        "versions": {name: version(name) for name in our_packages()},
        "settings": {name: getattr(arguments, name) for name in ("layers", "hidden", "rounds")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_mib": round(size / 2**20, 1),
        "median_seconds": {
            name: round(statistics.median(r[name] for r in measured), 3) for name in measured[0]
        },
        "rounds": measured,
    }
    name = "-".join(filter(None, ["checkpoint", sharding, slug]))
    out = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
