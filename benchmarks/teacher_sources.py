"""The quickstart with its teacher at every place: accuracy of each, beside the resident teacher's.

    python benchmarks/teacher_sources.py --out benchmarks/results/teacher-sources-cpu-2core.jsonl
    python benchmarks/teacher_sources.py --out ... --table

Runs that ``--out`` has a line for are not repeated, interrupted ones resume; several programs may
share ``--out`` and ``--runs``. A served teacher has the sampled loss, for it has no more than
likely ids, so the resident one is run with both. A cached one scores recorded rollouts alone: its
runs, and a resident one's beside them, learn from the same recorded samples. docs/teachers.md has
the table.
"""

import argparse
import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step import ARITHMETIC, REPOSITORY, commit, describe_hardware
from study import distill

EXACT = ("loss.method=tropd_exact", "loss.outlier=clip", "loss.tau=-2.5")
SAMPLED = ("loss.method=tropd", "loss.outlier=clip", "loss.tau=-2.5")
RECORDED_PROMPTS, SAMPLES = 1600, 4
RECORDED_STEPS = RECORDED_PROMPTS // 32


@dataclass(frozen=True)
class Source:
    """Where the teacher is in a run of the quickstart."""

    overrides: tuple[str, ...]
    beside: str
    """The run that it is compared with."""
    recorded: bool = False
    """Whether it learns from recorded rollouts."""


SOURCES = {
    "resident": Source(EXACT, "resident"),
    "on the host": Source((*EXACT, "teacher.offload=host"), "resident"),
    "in another layout": Source((*EXACT, "teacher.parallel.pipeline=2"), "resident"),
    "resident, sampled loss": Source(SAMPLED, "resident, sampled loss"),
    "served": Source((*SAMPLED, "teacher.placement=served"), "resident, sampled loss"),
    "resident, recorded": Source(SAMPLED, "resident, recorded", recorded=True),
    "cached": Source((*SAMPLED, "teacher.placement=cached"), "resident, recorded", recorded=True),
}


def record(runs: Path) -> Path:
    """Sample the recorded rollouts once."""
    path = runs / "rollouts.jsonl"
    if not path.exists():
        command = [sys.executable, str(REPOSITORY / "tools" / "rollouts.py")]
        command += ["--student", str(ARITHMETIC / "student"), "--max-new-tokens", "64"]
        command += ["--prompts", str(ARITHMETIC / "prompts.jsonl"), "--samples", str(SAMPLES)]
        command += ["--prompts-per-round", str(RECORDED_PROMPTS), "--out", str(path)]
        subprocess.run(command, check=True)
    return path


@contextmanager
def asked(source: str, runs: Path) -> Iterator[list[str]]:
    """Have what a source needs beside its run; further settings."""
    settings = list(SOURCES[source].overrides)
    if SOURCES[source].recorded:
        settings += [f"rollout.recorded={record(runs)}", f"train.steps={RECORDED_STEPS}"]
    if source != "resident" and "resident" not in source:
        settings += ["evaluation.teacher=false"]
    server: Any = nullcontext()
    if source == "served":
        sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
        from tests.vllm_serve import NAME, vllm_serve

        server = vllm_serve(ARITHMETIC / "teacher", runs / "server.log")
        settings += [f"teacher.served_model={NAME}"]
    with server as started:
        yield settings + ([f'teacher.address=["{started[0]}"]'] if started else [])


def make(source: str, seed: int, runs: Path) -> dict[str, Any] | None:
    """Make a run; its line, or None if it failed."""
    folder = runs / f"{source.replace(', ', '-').replace(' ', '-')}-{seed}"
    config = ARITHMETIC / "tropd.toml"
    if SOURCES[source].recorded:
        text = config.read_text().replace('[guidance]\nresponses = "responses.jsonl"\n', "")
        for name in ("student", "teacher", "prompts.jsonl", "heldout.jsonl"):
            text = text.replace(f'= "{name}"', f'= "{ARITHMETIC / name}"')
        config = runs / "recorded.toml"
        config.write_text(text)
    with asked(source, runs) as settings, folder.with_suffix(".log").open("a") as log:
        settings += [f"run.dir={folder}", f"train.seed={seed}", "run.tensorboard=false"]
        if source == "cached":
            settings += [f"teacher.cache={runs / 'scores'}"]
            score = [sys.executable, "-m", "megatron_tropd.cli", "score", str(config), *settings]
            subprocess.run(score, check=True, stdout=log, stderr=log)
        if code := distill(config, log, *settings):
            print(f"{source}, seed {seed}: exit code {code}, see {log.name}", flush=True)
            return None
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("student_before", "student_after", "seconds", "loss", "steps")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [step["loss"] for step in steps]
    return {
        "source": source,
        "seed": seed,
        **{name: summary[name] for name in kept},
        "losses": losses,
        "settings": list(SOURCES[source].overrides),
        "commit": commit(),
        "hardware": describe_hardware()[1],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """What was made."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else makes the run whose lock this is, until the block is left."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def table(made: list[dict[str, Any]]) -> str:
    """Every source's accuracies by seed, beside those that it is compared with."""

    def cell(source: str) -> str:
        found = sorted((m["seed"], m["student_after"]) for m in made if m["source"] == source)
        return ", ".join(f"{100 * after:.1f} ({seed})" for seed, after in found) or "not run"

    rows = ["| teacher | accuracy after, % (seed) | the resident one's |", "|---|---|---|"]
    for name, source in SOURCES.items():
        rows.append(f"| {name} | {cell(name)} | {cell(source.beside)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/teacher_sources"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--table", action="store_true", help="print what was made")
    args = parser.parse_args()
    runs = args.runs.resolve()
    if args.table:
        print(table(lines(args.out)))
        return
    runs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for source in args.only:
            with claimed(runs / f"{source.replace(' ', '-')}-{seed}.lock") as mine:
                there = {(line["source"], line["seed"]) for line in lines(args.out)}
                if mine and (source, seed) not in there and (line := make(source, seed, runs)):
                    with args.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(f"{source}, seed {seed}: {line['student_after']:.3f}", flush=True)


if __name__ == "__main__":
    main()
