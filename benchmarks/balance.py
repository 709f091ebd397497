"""Padding and waiting of a step's micro-batches, by who gets which rows.

    python benchmarks/balance.py [--steps N] [--measured N] [--table]

*Counted*: the padding of a step, and how long replicas would wait for the slowest if time were
floating-point work (``convert.sizes.row_flops`` of the recipes' 1.5B student and 7B teacher). Rows
are padded as on CUDA. ``in turns`` is how rows were dealt before: sorted, then in turn, so that all
replicas compute equal shapes. ``greedy`` is ``data.dealing``; ``differencing`` deals its
micro-batches by Karmarkar and Karp's method. Lengths are drawn log-normally (``LENGTHS``).

*Measured*: two replicas of a random pair on this machine's cores, with lengths 1/16 as long; the
same steps dealt in turns and by work, one after the other. Processor seconds of the busiest rank,
which other programs do not lengthen much, and how much more they are than the ranks' mean; beside
them what the metric ``waiting_share`` says, in which the others' load is.

The result goes to ``benchmarks/results/balance-<hardware>.json``; ``--table`` prints the committed
one as docs/parallelism.md shows it.
"""

import argparse
import heapq
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import REPOSITORY, commit, describe_hardware, our_packages, shown_command

from megatron_tropd.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_tropd.config.loss import preset
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder, read_config
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data import dealing
from megatron_tropd.data.dealing import BatchRows, Dealing, Work, deal
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer

RESULTS = REPOSITORY / "benchmarks" / "results"
MODELS = REPOSITORY / "configs" / "recipes" / "models"
PAIR = ("DeepSeek-R1-Distill-Qwen-1.5B", "Skywork-OR1-7B")
MULTIPLE = 128
SHRUNK = 16
REPLICAS = 2


class Lengths(NamedTuple):
    """Tokens of prompts and responses: median, spread of the logarithm, longest."""

    prompt: tuple[int, float, int]
    response: tuple[int, float, int]
    budget: int
    """``train.tokens_per_micro_batch``."""


LENGTHS = {
    "GSM8K-like": Lengths((95, 0.4, 400), (220, 0.5, 1024), 16384),
    "long-tailed": Lengths((150, 0.5, 800), (2500, 1.0, 16000), 32768),
}
SIZES = ((2, 128), (8, 512), (64, 1024))
"""Replicas, and rows of a step."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=20, help="counted for each row (default 20)")
    add("--measured", type=int, default=6, help="steps measured for each (default 6; 0: none)")
    add("--table", action="store_true", help="print the committed result; measure nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Count, measure, write the JSON, print it."""
    options = parse_arguments(arguments)
    if options.table:
        (path,) = RESULTS.glob("balance-*.json")
        print(table(json.loads(path.read_text())))
        return
    name, hardware = describe_hardware()
    hardware["load_average_before"] = round(os.getloadavg()[0], 2)
    began = time.time()
    result = {
        "hardware": hardware,
        "command": shown_command(["", *(arguments or sys.argv[1:])]).replace(
            "step.py", "balance.py"
        ),
        **commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in our_packages()},
        "settings": {"steps": options.steps, "measured": options.measured},
        "lengths": {kind: lengths._asdict() for kind, lengths in LENGTHS.items()},
        "counted": counted(options.steps),
        "measured": measured(options.measured) if options.measured else [],
        "seconds": round(time.time() - began, 1),
    }
    path = RESULTS / f"balance-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"Written to {path}")


def draw(lengths: Lengths, rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Tokens of the prompts and of the responses of one step."""
    rng = np.random.default_rng((seed, rows))

    def drawn(median: int, spread: float, longest: int) -> list[int]:
        values = rng.lognormal(np.log(median), spread, rows)
        return np.clip(values, 16, longest).astype(int).tolist()

    return drawn(*lengths.prompt), drawn(*lengths.response)


def in_turns(
    lengths: Sequence[int], padded: Sequence[int], *, dp_size: int, tokens_per_micro_batch: int
) -> Dealing:
    """Deal sorted rows in turn; the n-th micro-batch has one shape on all replicas."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    replicas: list[list[BatchRows]] = [[] for _ in range(dp_size)]
    start = 0
    while start < len(order):
        length = padded[order[start]]
        stop = start + dp_size * (tokens_per_micro_batch // length)
        for rank, batches in enumerate(replicas):
            batches.append(BatchRows(tuple(order[start:stop][rank::dp_size]), length))
        start = stop
    return Dealing(tuple(map(tuple, replicas)), sum(lengths))


def differencing(cuts: Sequence[Any], dp_size: int) -> list[list[Any]]:
    """Deal as many to each replica, by the largest differencing method."""
    heaviest_first = sorted(cuts, key=lambda cut: (-cut.work, cut.start))
    heap = []
    number = itertools.count()
    for start in range(0, len(cuts), dp_size):
        push(heap, number, [(c.work, [c]) for c in heaviest_first[start : start + dp_size]])
    while len(heap) > 1:
        (*_, one), (*_, other) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        push(heap, number, [(a[0] + b[0], a[1] + b[1]) for a, b in pairs])
    return [sorted(hand, key=lambda cut: (-cut.work, cut.start)) for _, hand in heap[0][-1]]


def push(heap: list[Any], number: Any, hands: list[tuple[float, list[Any]]]) -> None:
    """Add a way to deal some of the micro-batches, the most uneven first."""
    hands.sort(key=lambda hand: -hand[0])
    heapq.heappush(heap, (hands[-1][0] - hands[0][0], next(number), hands))


def by_differencing(*args: Any, **how: Any) -> Dealing:
    """As ``deal``, but for the last part."""
    greedy, dealing._dealt = dealing._dealt, differencing
    try:
        return deal(*args, **how)
    finally:
        dealing._dealt = greedy


def pair_flops(length: int) -> float:
    """Of a row in a step: forward and backward pass of the student, forward of the teacher."""
    shapes = [model_shape(read_config(MODELS / name)) for name in PAIR]
    return sum(row_flops(s, length) * passes for s, passes in zip(shapes, (3, 1), strict=True))


def counted(steps: int) -> list[dict[str, Any]]:
    """Every way to deal, for all kinds of lengths and sizes: means over the steps."""
    known: dict[int, float] = {}

    def work(length: int) -> float:
        if length not in known:
            known[length] = pair_flops(length)
        return known[length]

    ways = {
        "in turns": in_turns,
        "greedy": partial(deal, work=work),
        "differencing": partial(by_differencing, work=work),
    }
    found = []
    for (kind, lengths), (replicas, rows) in itertools.product(LENGTHS.items(), SIZES):
        drawn = [sum_of(*draw(lengths, rows, seed)) for seed in range(steps)]
        padded = [[-(-n // MULTIPLE) * MULTIPLE for n in each] for each in drawn]
        how = {"dp_size": replicas, "tokens_per_micro_batch": lengths.budget}
        by_way = {
            name: [way(*each, **how) for each in zip(drawn, padded, strict=True)]
            for name, way in ways.items()
        }
        slowest = {name: [busiest(d, work) for d in dealt] for name, dealt in by_way.items()}
        rounding = 1 - sum(map(sum, drawn)) / sum(map(sum, padded))
        for name, dealt in by_way.items():
            ratios = zip(slowest[name], slowest["in turns"], strict=True)
            found.append(
                {
                    "lengths": kind,
                    "replicas": replicas,
                    "rows": rows,
                    "dealt": name,
                    "padding_share": mean(d.padding_share for d in dealt),
                    "of_rounding": round(rounding, 4),
                    "waiting_share": mean(d.waiting_share(work) for d in dealt),
                    "micro_batches": mean(len(d.replicas[0]) for d in dealt),
                    "time_over_in_turns": mean(mine / before for mine, before in ratios),
                    "experts_shared_over_in_turns": mean(
                        in_step(d, work) / before
                        for d, before in zip(dealt, slowest["in turns"], strict=True)
                    ),
                }
            )
    return found


def sum_of(prompts: list[int], responses: list[int]) -> list[int]:
    """Positions of the rows."""
    return [prompt + response - 1 for prompt, response in zip(prompts, responses, strict=True)]


def busiest(dealt: Dealing, work: Work) -> float:
    """Work of the replica that has most."""
    return max(sum(len(b.rows) * work(b.length) for b in mine) for mine in dealt.replicas)


def in_step(dealt: Dealing, work: Work) -> float:
    """The same if replicas meet in every micro-batch, as those do that share experts."""
    rounds = zip(*dealt.replicas, strict=True)
    return sum(max(len(b.rows) * work(b.length) for b in batches) for batches in rounds)


def mean(values: Any) -> float:
    """Rounded."""
    return round(statistics.mean(values), 4)


def measured(steps: int) -> list[dict[str, Any]]:
    """Two ranks of this machine."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory(prefix="tropd-balance-") as scratch:
        for seed, name in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=2048,
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=2048,
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(Path(scratch) / name)
        mp.spawn(work_of_rank, (scratch, steps), nprocs=REPLICAS)
        return json.loads((Path(scratch) / "found.json").read_text())


def work_of_rank(rank: int, scratch: str, steps: int) -> None:
    """Learn from the same steps, dealt both ways."""
    from megatron_tropd.distill import step as step_module
    from megatron_tropd.distill.pair import step_parts
    from megatron_tropd.mcore import parallel

    torch.set_num_threads(1)
    store = f"file://{scratch}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=REPLICAS)
    by_work, found = step_module.dealt_to_replicas, []
    ways = {"in turns": dealt_in_turns, "greedy": by_work}
    layout = parallel.initialize(ParallelConfig(data=REPLICAS), seed=1)
    folders = {name: HFFolder(Path(scratch) / name) for name in ("student", "teacher")}
    for kind, lengths in LENGTHS.items():
        parts = step_parts(config_of(scratch, lengths.budget // SHRUNK), folders, layout)
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for number in range(-1, steps):
            sequences = made_sequences(lengths, max(number, 0))
            for name, way in ways.items():
                setattr(step_module, "dealt_to_replicas", way)  # noqa: B010
                dist.barrier()
                began = time.process_time()
                metrics = step_module.learn(parts, sequences, max(number, 0)).metrics
                shares = {key: metrics[key] for key in ("padding_share", "waiting_share")}
                each = [torch.zeros(1) for _ in range(REPLICAS)]
                dist.all_gather(each, torch.tensor([time.process_time() - began]))
                most = max(map(float, each))
                idle = 1 - sum(map(float, each)) / REPLICAS / most
                if number >= 0:  # the first is a warm-up
                    seconds[name].append({"cpu_seconds": most, "idle_share": idle, **shares})
        for name, steps_of in seconds.items():
            medians = {k: round(statistics.median(s[k] for s in steps_of), 4) for k in steps_of[0]}
            pairs = zip(steps_of, seconds["in turns"], strict=True)
            ratio = statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs)
            found.append({"lengths": kind, "dealt": name, **medians, "ratio": round(ratio, 3)})
    if rank == 0:
        (Path(scratch) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def dealt_in_turns(parts: Any, sequences: Sequence[TokenSequence]) -> Dealing:
    """What a step did before."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    how = {"dp_size": REPLICAS, "tokens_per_micro_batch": parts.tokens_per_micro_batch}
    return in_turns(lengths, lengths, **how)


def config_of(scratch: str, budget: int) -> Config:
    """Settings of the pair."""
    return Config(
        model=ModelConfig(student=f"{scratch}/student", teacher=f"{scratch}/teacher"),
        parallel=ParallelConfig(data=REPLICAS),
        rollout=RolloutConfig(prompts="none", max_new_tokens=1),
        loss=preset("tropd"),
        train=TrainConfig(steps=100, tokens_per_micro_batch=budget),
        run=RunConfig(dir=scratch),
    )


def made_sequences(lengths: Lengths, seed: int) -> list[TokenSequence]:
    """Random tokens of lengths that are 1 / SHRUNK as long."""
    prompts, responses = draw(lengths, SIZES[0][1], seed)
    rng = np.random.default_rng(seed)

    def ids(tokens: int) -> list[int]:
        return rng.integers(3, 2048, max(tokens // SHRUNK, 2)).tolist()

    made = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        runs = (Writer.CONTEXT, ids(prompt)), (Writer.STUDENT, ids(response))
        logprobs = (-7.6,) * len(runs[1][1])
        key = SampleKey(seed, number // 4, number % 4)
        made.append(TokenSequence.of_runs(key, *runs, logprobs=logprobs, version=seed))
    return made


def table(result: dict[str, Any]) -> str:
    """The counted rows and the measured ones, for docs/parallelism.md."""
    lines = [
        "| lengths | replicas, rows | dealt | padding | waiting | micro-batches | time "
        "| time, experts shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["counted"]:
        lines.append(
            f"| {row['lengths']} | {row['replicas']}, {row['rows']} | {row['dealt']} "
            f"| {row['padding_share']:.1%} | {row['waiting_share']:.1%} "
            f"| {row['micro_batches']:.1f} | {row['time_over_in_turns']:.3f} "
            f"| {row['experts_shared_over_in_turns']:.3f} |"
        )
    if not result["measured"]:
        return "\n".join(lines).replace("%", " %")
    lines += ["", "| lengths | dealt | padding | idle | `waiting_share` | CPU seconds | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["measured"]:
        lines.append(
            f"| {row['lengths']} | {row['dealt']} | {row['padding_share']:.1%} "
            f"| {row['idle_share']:.1%} | {row['waiting_share']:.1%} | {row['cpu_seconds']:.2f} "
            f"| {row['ratio']:.2f} |"
        )
    return "\n".join(lines).replace("%", " %")


if __name__ == "__main__":
    main()
