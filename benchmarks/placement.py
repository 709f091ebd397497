"""Engines beside the trainer or as servers: seconds of a step, and of handing weights over.

    python benchmarks/placement.py [--steps N] [--rounds N] [--hidden N] [--layers N]

*Steps*: the arithmetic example, two ranks (tensor parallel) and two engines of one thread each, run
as a user runs it: engines colocated; two servers; and these with samples
asked for one step ahead. All in every round; the first steps of each run are
dropped, the rest pooled into medians. Everything shares this machine's cores, so what servers on
nodes of their own gain by working while the trainer does is not in these numbers.

*Hand-over*: a random student (``--hidden``, ``--layers``) to two servers through the folder.
``trainer`` is how long the trainer stands still; ``samples`` how long until both servers have
sampled one token with the new weights.
The folder lies on a local disk, most of it in memory: a shared file system is slower.

The result goes to ``benchmarks/results/placement-<hardware>.json``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step import (
    ARITHMETIC,
    PHASES,
    REPOSITORY,
    commit,
    describe_hardware,
    our_packages,
    run_logged,
    shown_command,
)

TROPD = [sys.executable, "-m", "megatron_tropd.cli"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SEPARATE = "rollout.placement=separate"
ROWS = {
    "colocated": [],
    "servers, folder": [SEPARATE],
    "servers, folder, one step ahead": [
        *(SEPARATE, "rollout.steps_ahead=1", "loss.importance=truncated"),
    ],
}
START_SECONDS = 600.0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=15, help="of each run (default 15)")
    add("--warm-up", type=int, default=5, help="first steps of each run to drop (default 5)")
    add("--rounds", type=int, default=2, help="how often each is run (default 2)")
    add("--layers", type=int, default=12, help="of the student that is handed over")
    add("--hidden", type=int, default=1024, help="of the student that is handed over")
    add("--hand-overs", type=int, default=5, help="of each kind (default 5)")
    add("--folder", type=Path, help="for runs and weights; default: the temporary folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print it."""
    options = parse_arguments(arguments)
    name, hardware = describe_hardware()
    hardware["load_average_before"] = round(os.getloadavg()[0], 2)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="tropd-placement-", dir=options.folder) as scratch:
        steps = measure_steps(options, Path(scratch))
        hand_over = measure_hand_over(options, Path(scratch))
    result: dict[str, Any] = {
        "hardware": hardware,
        "command": shown_command(["", *(arguments or sys.argv[1:])]).replace(
            "step.py", "placement.py"
        ),
        **commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in our_packages()},
        "settings": {k: v for k, v in vars(options).items() if k != "folder"},
        "steps": steps,
        "hand_over": hand_over,
        "seconds": round(time.time() - began, 1),
    }
    path = REPOSITORY / "benchmarks" / "results" / f"placement-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: result[k] for k in ("steps", "hand_over")}, indent=1))
    print(f"Written to {path}")


def measure_steps(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Every row in every round; medians over the steps after the warm-up."""
    runs: dict[str, list[list[dict[str, float]]]] = {row: [] for row in ROWS}
    for number in range(options.rounds):
        for row, overrides in ROWS.items():
            folder = scratch / f"{number}-{row.replace(' ', '')}"
            runs[row].append(one_run(options, folder, overrides)[options.warm_up :])
            shutil.rmtree(folder)
    first = statistics.median(s["total"] for run in runs["colocated"] for s in run)
    return [summarise(row, runs[row], first) for row in ROWS]


def one_run(
    options: argparse.Namespace, folder: Path, overrides: list[str]
) -> list[dict[str, float]]:
    """Seconds of each step of a run, in total and by phase."""
    folder.mkdir()
    words = [str(example(folder)), f"run.dir={folder / 'run'}", f"train.steps={options.steps}"]
    words += ["run.checkpoint_every=0", "run.trajectories_every=0", *overrides]
    with two_servers(words, folder) if overrides else nothing():
        run_logged([*TROPD, "distill", *words], folder, {})
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {phase: line[f"seconds_{phase}"] for phase in (*PHASES, "total")}
        for line in map(json.loads, lines)
    ]


def example(folder: Path) -> Path:
    """The arithmetic example without its evaluations, in a folder of its own."""
    tables = tomllib.loads((ARITHMETIC / "tropd.toml").read_text())
    del tables["evaluation"]
    for section, key in (("model", "student"), ("model", "teacher"), ("rollout", "prompts")):
        tables[section][key] = str(ARITHMETIC / tables[section][key])
    tables["guidance"]["responses"] = str(ARITHMETIC / tables["guidance"]["responses"])
    path = folder / "example.toml"
    # JSON's strings, numbers and lists are TOML's.
    path.write_text(
        "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in table.items())
            for name, table in tables.items()
        )
    )
    return path


def summarise(row: str, runs: list[list[dict[str, float]]], colocated: float) -> dict[str, Any]:
    """Medians over the steps of all rounds."""
    steps = [step for run in runs for step in run]
    seconds = {k: round(statistics.median(s[k] for s in steps), 4) for k in (*PHASES, "total")}
    return {
        "name": row,
        "steps": len(steps),
        "seconds": seconds,
        "total_over_colocated": round(seconds["total"] / colocated, 3),
        "total_of_rounds": [round(statistics.median(s["total"] for s in run), 4) for run in runs],
    }


def measure_hand_over(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """From a trainer of one rank that does nothing else."""
    import torch.distributed as dist

    student = make_student(options, scratch / "student")
    words = [
        *(str(example(scratch)), f"run.dir={scratch / 'run'}", SEPARATE),
        f"model.student={student}",
    ]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with two_servers(words, scratch):
        hand_over = HandOver(words, student)
        hand_over.once(1)  # engines sample for the first time
        rounds = [hand_over.once(number + 2) for number in range(options.hand_overs)]
        (scratch / "run" / "summary.json").write_text("{}")
    dist.destroy_process_group()
    medians = {name: round(statistics.median(m[name] for m in rounds), 3) for name in rounds[0]}
    return {
        "weights_mib": round(hand_over.size / 2**20, 1),
        "median_seconds": {"folder": medians},
        "rounds": {"folder": rounds},
    }


class HandOver:
    """A trainer that has nothing but weights."""

    def __init__(self, words: list[str], student: Path) -> None:
        """``words``: config and overrides of the servers."""
        from safetensors.torch import load_file

        from megatron_tropd.config import load_config
        from megatron_tropd.rollout.engines.served import ServerPool

        self._config = load_config(words[0], words[1:])
        tensors = load_file(student / "model.safetensors")
        self._tensors = {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}
        self.size = sum(tensor.nbytes for tensor in self._tensors.values())
        self._pool: ServerPool = self._make_pool()

    def _make_pool(self) -> Any:
        from megatron_tropd.data.dispatch import Patience
        from megatron_tropd.rollout.engines.client import ClientSettings
        from megatron_tropd.rollout.engines.served import ServerPool
        from megatron_tropd.rollout.engines.wire import served_settings
        from megatron_tropd.rollout.weights.versions import WeightVersions

        run = Path(self._config.run.dir).resolve()
        return ServerPool(
            ClientSettings(run / "servers", served_settings(self._config)),
            WeightVersions(run / "weights"),
            rank=0,
            num_servers=2,
            patience=Patience(lost_seconds=START_SECONDS),
        )

    def once(self, step: int) -> dict[str, float]:
        """Seconds of one hand-over of weights that no server has yet."""
        from megatron_tropd.data.samples import SampleRequest, Sampling

        pool = self._pool
        start = time.perf_counter()
        pool.channel.send(self._tensors.items(), step)
        trainer = time.perf_counter() - start
        pool.generate([SampleRequest((5, 6, 7), 1, seed) for seed in range(2)], Sampling())
        samples = time.perf_counter() - start
        return {"trainer": trainer, "samples": samples}


def make_student(options: argparse.Namespace, folder: Path) -> Path:
    """A random Llama with the tokenizer of the example's student."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(ARITHMETIC / "student", folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_hidden_layers = options.hidden, options.layers
    config.intermediate_size = 4 * options.hidden
    config.num_attention_heads = config.num_key_value_heads = options.hidden // 64
    config.head_dim = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100GB")
    return folder


@contextmanager
def two_servers(words: list[str], folder: Path) -> Iterator[None]:
    """Servers of a run that completes in the block."""
    processes = []
    try:
        for number in range(2):
            with (folder / f"server_{number}.txt").open("w") as log:
                command = [*TROPD, "serve", *words, "--number", str(number)]
                processes.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=log, env={**os.environ, **ONE_THREAD}
                    )
                )
        yield
        for process in processes:
            process.wait(30)
    finally:
        for process in processes:
            process.kill()


@contextmanager
def nothing() -> Iterator[None]:
    """Colocated engines need no servers."""
    yield


if __name__ == "__main__":
    main()
