"""Distil a student on a mixture of two tasks, with a teacher for each and with either alone.

    python examples/two_teachers/make_models.py --out runs/two_teachers
    python benchmarks/two_teachers.py --out benchmarks/results/two-teachers-cpu-2core-amd-epyc.json

Runs and evaluations that are complete in ``--runs`` are not repeated. docs/teachers.md
has the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step import commit, describe_hardware, our_packages

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "examples" / "two_teachers" / "two_teachers.toml"
TASKS = ("plain", "mirrored")
WHO = {"both": "a teacher for each task", "plain": "the plain one", "mirrored": "the mirrored one"}
"""Whose the runs are."""


def config_of(who: str, models: Path, folder: Path) -> Path:
    """Write the settings of a run: those of the example, with one teacher alone if it is one's."""
    text = CONFIG.read_text()
    if who != "both":
        (one,) = (t for t in tomllib.loads(text)["teachers"] if t["name"] == who)
        head, _, rest = text.partition("[[teachers]]")
        rest = rest[rest.index("[rollout]") :]
        text = f'{head}teacher = "{one["model"]}"\n\n{rest}'
    text = text.replace("../../runs/two_teachers", str(models))
    text = text.replace("../arithmetic", str(CONFIG.parents[1] / "arithmetic"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{who}.toml"
    path.write_text(text)
    return path


def tropd(*words: object, log: Path | None = None) -> str:
    """Run a command of the package; its output."""
    command = [sys.executable, "-m", "megatron_tropd.cli", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    if done.returncode not in (0,):
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return done.stdout


def accuracies(model: Path, models: Path, like: Path) -> dict[str, float]:
    """Share of each task's held-out problems that a model answers rightly."""
    found = {}
    for task in TASKS:
        words = ("evaluate", model, models / f"{task}.jsonl", "--like", like, "--json")
        found[task] = json.loads(tropd(*words))["accuracy"]
    return found


def one_run(who: str, seed: int, models: Path, runs: Path) -> dict[str, Any]:
    """Train and measure, or read what was measured before."""
    folder = runs / f"{who}-{seed}"
    done = folder / "accuracies.json"
    if not done.exists():
        config = config_of(who, models, runs)
        log = runs / f"{who}-{seed}.log"
        tropd("distill", config, f"run.dir={folder}", f"train.seed={seed}", log=log)
        done.write_text(json.dumps(accuracies(folder / "student_hf", models, folder)))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    shares = {name: v for name, v in last.items() if name.startswith("teacher/")}
    return {"seed": seed, "accuracy": json.loads(done.read_text()), "last_step": shares}


def table(before: dict[str, float], rows: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown: medians, and each seed's."""
    lines = ["| teachers | plain | mirrored |", "|---|---|---|"]
    lines.append("| before | " + " | ".join(f"{100 * before[t]:.1f} %" for t in TASKS) + " |")
    for who, found in rows.items():
        cells = []
        for task in TASKS:
            each = [100 * run["accuracy"][task] for run in found]
            listed = ", ".join(f"{value:.1f}" for value in each)
            cells.append(f"{statistics.median(each):.1f} % ({listed})")
        lines.append(f"| {WHO[who]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/two_teachers"))
    parser.add_argument("--runs", type=Path, default=Path("runs/two_teachers/runs"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models, runs = args.models.resolve(), args.runs.resolve()
    rows: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    for seed in args.seeds:
        for who, found in rows.items():
            found.append(one_run(who, seed, models, runs))
    like = runs / f"both-{args.seeds[0]}"
    made = json.loads((models / "models.json").read_text())
    before = {t: v["accuracy"] for t, v in made["student"]["accuracy"].items()}
    result = {
        "command": "python benchmarks/two_teachers.py",
        "commit": commit(),
        "hardware": describe_hardware()[1],
        "packages": {package: version(package) for package in our_packages()},
        "models": made,
        "steps": tomllib.loads(CONFIG.read_text())["train"]["steps"],
        "runs": rows,
        "like": like.name,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(before, rows))


if __name__ == "__main__":
    main()
