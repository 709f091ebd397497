"""Distil a student on a mixture of two tasks, with a teacher for each and with either alone.

    python examples/two_teachers/make_models.py --out runs/two_teachers
    python benchmarks/two_teachers.py --out benchmarks/results/two-teachers-cpu-2core-amd-epyc.json

Runs that are complete in ``--runs`` are not repeated. docs/teachers.md has the table.
"""

import argparse
import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step import commit, describe_hardware, our_packages
from study import distill

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "examples" / "two_teachers" / "two_teachers.toml"
TASKS = ("plain", "mirrored")
WHO = {
    "both": "a teacher for each task",
    "plain": "the plain task's alone",
    "mirrored": "the mirrored task's alone",
}
"""Whose the runs are."""


def config_of(who: str, models: Path, runs: Path) -> Path:
    """Write the settings of a run: the example's, or with one of the teachers for both tasks."""
    text = CONFIG.read_text()
    if who != "both":
        head, *tables = text.split("[[teachers]]")
        rest = tables[-1][tables[-1].index("[rollout]") :]
        (mine,) = (t for t in tomllib.loads(text)["teachers"] if t["name"] == who)
        mine["sources"] = list(TASKS)
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in mine.items())
        text = f"{head}[[teachers]]\n{table}\n{rest}"
    text = text.replace("../../runs/two_teachers", str(models))
    text = text.replace("../arithmetic", str(CONFIG.parents[1] / "arithmetic"))
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / f"{who}.toml"
    path.write_text(text)
    return path


def one_run(who: str, seed: int, models: Path, runs: Path) -> dict[str, Any]:
    """Run, unless it is complete; its evaluations, and what the last step says of each teacher."""
    folder = runs / f"{who}-{seed}"
    if not (folder / "summary.json").exists():
        config = config_of(who, models, runs)
        with (runs / f"{who}-{seed}.log").open("a") as log:
            code = distill(config, log, f"run.dir={folder}", f"train.seed={seed}")
        if code:
            raise SystemExit(f"{who}, seed {seed}: exit code {code}, see {log.name}")
    measured = [json.loads(text) for text in (folder / "evaluations.jsonl").open()]
    curve = [{"step": r["step"], **{t: r[f"accuracy/{t}"] for t in TASKS}} for r in measured]
    steps = [json.loads(text) for text in (folder / "metrics.jsonl").open()]
    return {
        "seed": seed,
        "before": curve[0],
        "after": curve[-1],
        "curve": curve,
        "last_step": {n: v for n, v in steps[-1].items() if n.startswith("teacher/")},
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown, one number a seed."""

    def cells(found: list[dict[str, Any]], when: str) -> str:
        return " | ".join(
            ", ".join(f"{100 * run[when][task]:.1f} %" for run in found) for task in TASKS
        )

    lines = ["| teachers | plain task | mirrored task |", "|---|---|---|"]
    lines.append(f"| before | {cells(next(iter(rows.values()))[:1], 'before')} |")
    lines += [f"| {WHO[who]} | {cells(found, 'after')} |" for who, found in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("runs/two_teachers"))
    parser.add_argument("--runs", type=Path, default=Path("runs/two_teachers/runs"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--only", nargs="+", choices=WHO, default=list(WHO), help="make no others")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models, runs = args.models.resolve(), args.runs.resolve()
    rows: dict[str, list[dict[str, Any]]] = {who: [] for who in args.only}
    for seed in args.seeds:
        for who, found in rows.items():
            found.append(one_run(who, seed, models, runs))
    result = {
        "command": "python benchmarks/two_teachers.py",
        "commit": commit(),
        "hardware": describe_hardware()[1],
        "packages": {package: version(package) for package in our_packages()},
        "models": json.loads((models / "models.json").read_text()),
        "config": tomllib.loads(CONFIG.read_text()),
        "runs": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
