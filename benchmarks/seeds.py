r"""Run configs over several seeds and write one table: the numbers in the examples' READMEs.

    python benchmarks/seeds.py examples/arithmetic/tropd.toml examples/arithmetic/opd.toml \
        --seeds 1 2 3 --out benchmarks/results/arithmetic-cpu-2core-amd-epyc.json

Runs that are complete in ``--runs`` are not repeated, interrupted ones resume. With ``--jobs 2``
two runs share the machine (their seconds then say little; accuracies and divergences do not change
for it).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step import commit, describe_hardware, our_packages, shown_path

MEASURES = (
    ("student_before", "student_after", "teacher"),
    ("student_before_reverse_kl", "student_after_reverse_kl"),
)


def run(config: Path, seed: int, folder: Path, overrides: list[str], *, alone: bool) -> dict:
    """One run to its end. Returns its summary; raises if it fails."""
    environment = os.environ | ({} if alone else {"OMP_NUM_THREADS": "1"})
    command = [sys.executable, "-m", "megatron_tropd.cli", "distill", str(config)]
    command += [f"run.dir={folder}", f"train.seed={seed}", *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    return json.loads((folder / "summary.json").read_text())


def row(config: Path, summaries: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Every seed's numbers and their medians."""
    first = next(iter(summaries.values()))
    names = next(group for group in MEASURES if group[0] in first)
    return {
        "config": shown_path(config),
        "loss": first["loss"],
        "steps": first["steps"],
        "seeds": {
            seed: {name: summary[name] for name in (*names, "seconds")}
            for seed, summary in summaries.items()
        },
        "median": {
            name: statistics.median(summary[name] for summary in summaries.values())
            for name in (*names, "seconds")
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = [name for name in rows[0]["median"] if name != "seconds"]
    lines = [
        f"| config | loss | {' | '.join(names)} (each seed) |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for entry in rows:
        cells = []
        for name in names:
            each = ", ".join(f"{seed[name]:.3f}" for seed in entry["seeds"].values())
            cells.append(f"{entry['median'][name]:.3f} ({each})")
        lines.append(f"| `{entry['config']}` | {entry['loss']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(argument: str) -> str:
    return shown_path(argument) if "/" in argument and "=" not in argument else argument


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            (config, seed): pool.submit(
                run,
                config,
                seed,
                args.runs / f"{config.parent.name}-{config.stem}-{seed}",
                args.set,
                alone=args.jobs == 1,
            )
            for seed in args.seeds
            for config in args.configs
        }
        rows = [
            row(config, {seed: futures[config, seed].result() for seed in args.seeds})
            for config in args.configs
        ]
    result = {
        "command": " ".join(["python benchmarks/seeds.py", *map(_shown, sys.argv[1:])]),
        "commit": commit(),
        "hardware": describe_hardware()[1],
        "versions": {name: version(name) for name in our_packages()},
        "jobs": args.jobs,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
