"""What a first hour on one GPU should show: parts in order, within 30 minutes, and one JSON.

    benchmarks/gpu_day.sh [--out DIR] [--resume] [--only NAME ...] [--minutes N] [--dry-run]

Each part is a command with a time limit and a log of its own. A part that fails, hangs or lacks a
package leaves the others alone; the JSON says of each what became of it, and is written anew after
each. ``--resume`` leaves out the parts that are done in it. Exit codes: 0 if every part was done or
skipped for a reason, 1 if one failed, 2 without a GPU, 128 + n after signal n (the part under way
is ended and recorded first).

Standard library only: it has to say what is missing.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
LOGS = REPOSITORY / "runs" / "gpu-day"
MINUTES = 30.0
RESERVE_SECONDS = 20.0
"""Of the whole time, for stopping the last part and writing."""
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL, for a part that saves nothing."""
TROPD_GRACE_SECONDS = 300.0
"""The longest that ``tropd`` lets a run save (GRACE_SECONDS of its launcher)."""
MEMORY_SECONDS = 30.0
"""Longest wait for the GPU memory of the part before."""
MEMORY_SLACK_MIB = 512
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PACKAGES = (
    *("torch", "triton", "megatron-core", "vllm", "transformers", "transformer-engine"),
    *("nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)
_DEVICE = """
import json, torch
there = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if there else []
print(json.dumps({"torch": torch.__version__, "built_for": torch.version.cuda, "names": names}))
"""


@dataclass(frozen=True)
class Part:
    """One command."""

    name: str
    command: tuple[str, ...]
    """``{out}`` stands for the part's own folder."""
    seconds: int
    """Time limit."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    numbers: Callable[[Path, str], dict[str, Any]] = lambda folder, log: {}
    """Key numbers, from its folder and its log."""
    imports: str = ""
    """A module that has to import, too."""
    grace: float | None = None
    """Seconds to end in after SIGTERM; None: ``GRACE_SECONDS``."""


def parts() -> list[Part]:
    """All parts, those of most worth first: the last ones are dropped when time runs out."""
    python = sys.executable
    step = (python, "benchmarks/gpu_step.py", "--layers")
    junit = ("-p", "no:cacheprovider", "--junitxml", "{out}/junit.xml")
    quickstart = (
        *("distill", "examples/arithmetic/tropd.toml", "run.dir={out}/run"),
        *("parallel.tensor=1", "rollout.num_engines=1"),
    )
    return [
        Part(
            "doctor",
            (python, "-m", "megatron_tropd.cli", "doctor"),
            120,
            numbers=doctor_numbers,
        ),
        Part(
            "gpu suite",
            (python, "-m", "pytest", "tests/gpu", *junit),
            360,
            ("pytest", "megatron"),
            suite_numbers,
        ),
        Part("step, local layers", (*step, "local"), 120, ("megatron",), last_json),
        Part(
            "vLLM: sleep and reload",
            (python, "benchmarks/gpu_engine.py"),
            240,
            ("vllm",),
            last_json,
        ),
        Part(
            "quickstart",
            (python, "-m", "megatron_tropd.cli", *quickstart),
            400,
            ("megatron", "vllm"),
            run_numbers,
            grace=TROPD_GRACE_SECONDS,
        ),
        Part(
            "kernels",
            (python, "benchmarks/kernels.py", "--loaded", "--write", "{out}/kernels.json"),
            180,
            ("triton",),
            kernel_numbers,
        ),
        Part(
            "losses",
            (
                *(python, "benchmarks/loss_gpu.py", "--tokens", "32768", "--rounds", "3"),
                *("--write", "{out}/losses.json"),
            ),
            240,
            ("triton",),
            loss_numbers,
        ),
        Part(
            "step, Transformer Engine",
            (*step, "te"),
            120,
            ("megatron", "transformer_engine"),
            last_json,
            "transformer_engine.pytorch",
        ),
    ]


# --- Key numbers ---------------------------------------------------------------------------------


def doctor_numbers(folder: Path, log: str) -> dict[str, Any]:
    """What the doctor says in the end."""
    return {"says": log.strip().splitlines()[-1]}


def suite_numbers(folder: Path, log: str) -> dict[str, Any]:
    """Counts of the suite, and of every failure the name and the first line."""
    root = ElementTree.parse(folder / "junit.xml").getroot()
    cases = list(root.iter("testcase"))
    failed, skipped = [], []
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                message = (found.get("message") or "").splitlines()
                failed.append([case.get("name"), message[0][:300] if message else kind])
        if (found := case.find("skipped")) is not None:
            skipped.append(found.get("message"))
    counts = {"tests": len(cases), "failed": len(failed), "skipped": len(skipped)}
    return counts | {"failures": failed, "reasons to skip": sorted({str(x) for x in skipped})}


def kernel_numbers(folder: Path, log: str) -> dict[str, Any]:
    """How many variants loaded, and which differ from what was compiled ahead of time."""
    rows = json.loads((folder / "kernels.json").read_text())["rows"]
    figures = [value for row in rows for value in row.values() if isinstance(value, dict)]
    return {
        "variants": len(rows),
        "unlike compiled": [row["variant"] for row in rows if not row["as compiled"]],
        "most registers": max(f["registers"] for f in figures),
        "most local bytes": max(f["local_bytes"] for f in figures),
    }


def loss_numbers(folder: Path, log: str) -> dict[str, Any]:
    """Ratio to the bare products and peak of every row; bytes a second of every kernel."""
    result = json.loads((folder / "losses.json").read_text())
    return {
        "ratio": {row["name"]: round(row["ratio"], 3) for row in result["rows"]},
        "peak_mib": {row["name"]: round(row["peak_mib"]) for row in result["rows"]},
        "gb_per_second": {
            name: round(rate["gb_per_second"]) for name, rate in result["kernels"]["passes"].items()
        },
    }


def last_json(folder: Path, log: str) -> dict[str, Any]:
    """The object in the last line that is one."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def run_numbers(folder: Path, log: str) -> dict[str, Any]:
    """How far the run came, its accuracies and the median seconds of its phases."""
    run = folder / "run"
    lines = [json.loads(line) for line in _lines(run / "metrics.jsonl")]
    evaluations = [json.loads(line) for line in _lines(run / "evaluations.jsonl")]
    seconds: dict[str, float] = {}
    for name in lines[-1] if lines else ():
        if name.startswith("seconds"):
            values = sorted(line[name] for line in lines if name in line)
            seconds[name] = values[len(values) // 2]
    summary = run / "summary.json"
    return {
        "steps": len(lines),
        "finished": summary.exists(),
        "evaluations": evaluations,
        "median seconds": seconds,
        "summary": json.loads(summary.read_text()) if summary.exists() else None,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# --- Running them --------------------------------------------------------------------------------


class Day:
    """The result, on disk after every part."""

    def __init__(self, path: Path, logs: Path, device: dict[str, Any], *, resume: bool) -> None:
        """``path``: of the JSON; ``logs``: a folder for each part goes there."""
        self.path, self.logs = path, logs
        self.parts: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            self.parts = json.loads(path.read_text())["parts"]
        self._free_at_first = free_memory()
        self._head = {
            "what": "a first hour on one GPU",
            "device": device,
            "versions": versions(),
            "python": sys.version.split()[0],
            **commit(),
        }

    def run(self, part: Part, limit: float) -> None:
        """One part, and what became of it."""
        folder = self.logs / re.sub(r"\W+", "-", part.name.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        record: dict[str, Any] = {
            **{"command": shown(part), "limit": round(limit), "log": log.name},
            "memory before": self.wait_for_memory(limit),
        }
        start = time.monotonic()
        try:
            record["rc"] = run_command(
                [word.replace("{out}", str(folder)) for word in part.command],
                *(log, limit),
                grace=GRACE_SECONDS if part.grace is None else part.grace,
            )
            status = {0: "done", None: "timed out"}.get(record["rc"], "failed")
        except OSError as error:
            record |= {"rc": None, "error": str(error)}
            status = "failed"
        except BaseException:  # a signal: the caller's time is over
            record |= {"rc": None, "status": "interrupted"}
            self.record(part.name, record | {"seconds": round(time.monotonic() - start, 1)})
            raise
        record |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
        text = log.read_text(errors="replace") if log.exists() else ""
        if status != "done":
            record["last lines"] = text.splitlines()[-40:]
        try:
            record["numbers"] = part.numbers(folder, text)
        except Exception as error:  # a part that failed half-way leaves anything behind
            record["numbers"] = {}
            record["numbers lacking"] = f"{type(error).__name__}: {error}"
        self.record(part.name, record)

    def wait_for_memory(self, limit: float) -> dict[str, Any]:
        """Free MiB of each GPU, once the part before has given back what it took, or too late."""
        begun = time.monotonic()
        while True:
            free, waited = free_memory(), time.monotonic() - begun
            first = self._free_at_first
            back = len(free) == len(first) and all(
                now >= then - MEMORY_SLACK_MIB for now, then in zip(free, first, strict=True)
            )
            if back or not free or waited >= min(MEMORY_SECONDS, limit):
                return {"free_mib": free, "waited": round(waited, 1), "all is back": back}
            time.sleep(0.5)

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Keep what became of a part, and write everything."""
        self.parts[name] = record | {"time": time.strftime("%Y-%m-%d %H:%M")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self._head | {"parts": self.parts}, indent=1) + "\n")
        unfinished.replace(self.path)

    def is_done(self, name: str) -> bool:
        """Whether an earlier call did this part."""
        return self.parts.get(name, {}).get("status") == "done"


def run_command(command: Sequence[str], log: Path, limit: float, *, grace: float) -> int | None:
    """Run a command, its output into ``log``.

    Args:
        command: program and arguments.
        log: overwritten.
        limit: seconds; then the command and what it started are ended.
        grace: seconds that the command has to end by itself when asked to.

    Returns:
        The exit code; None: it ran into the limit.
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": path,  # the package need not be installed
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process, grace)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a command and all it started: engines and ranks would keep the GPU's memory."""
    started = _session(process.pid) | _descendants(process.pid)
    if process.poll() is None:  # only the command: it tells its own to save
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            started |= _descendants(process.pid)
    for pid in started | _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> set[int]:
    """Processes of a session, its leader dead or alive."""
    return {pid for pid, (_, session) in _processes().items() if session == leader}


def _descendants(root: int) -> set[int]:
    """Processes that a live one started, and so on: ranks may have sessions of their own."""
    table, found = _processes(), {root}
    while more := {pid for pid, (parent, _) in table.items() if parent in found} - found:
        found |= more
    return found & table.keys()


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that is not a zombie."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(path.parent.name)] = int(parent), int(session)
    return found


def free_memory() -> list[int]:
    """Free MiB of each GPU by nvidia-smi; none if it does not say."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return [int(line) for line in said.stdout.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []


def _leave_by_signals() -> None:
    """Leave by an exception: parts are in sessions of their own and would stay on the GPU."""

    def leave(number: int, frame: object) -> None:
        for one in STOPS:  # a second one must not cut the end of the part short
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for one in STOPS:
        signal.signal(one, leave)


def find_device() -> dict[str, Any]:
    """What torch sees, asked in a process of its own, which leaves nothing on the GPU."""
    run = subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, text=True)
    if run.returncode:
        return {"names": [], "error": (run.stderr.strip().splitlines() or ["no reason given"])[-1]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def no_gpu(device: dict[str, Any]) -> str:
    """Why there is nothing to run on."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        listed = ""
    if "error" in device:
        return f"torch does not import: {device['error']}"
    if "GPU " in listed:
        return (
            f"nvidia-smi lists {listed.count('GPU ')} GPU(s), and torch {device['torch']} (built "
            f"for CUDA {device['built_for']}) sees none: another driver, another torch, or "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(not set)')}"
        )
    return "this machine has no NVIDIA GPU"


def lacking(part: Part) -> str | None:
    """Why a part cannot run here; None: it can."""
    for name in part.needs:
        if find_spec(name) is None:
            return f"{name} not installed"
    if not part.imports:
        return None
    # torch first: it loads the CUDA libraries that lie in packages of their own.
    probe = [sys.executable, "-c", f"import torch, {part.imports}"]
    run = subprocess.run(probe, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{part.imports} does not import: {reason}"
    return None


def versions() -> dict[str, str | None]:
    """Of the packages that matter here; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """The commit of the checkout, if git knows it."""
    ask = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*ask, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return {"commit": None, "modified": None}
    if head.returncode:
        return {"commit": None, "modified": None}
    return {"commit": head.stdout.strip(), "modified": bool(status.stdout.strip())}


def shown(part: Part) -> str:
    """The command without folders of this machine."""
    return " ".join(part.command).replace(sys.executable, "python")


def slug(text: str) -> str:
    """Lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def parse_arguments(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    """The command line; None: that of the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of result and logs (default: benchmarks/results, runs)")
    add("--resume", action="store_true", help="leave out the parts that are done")
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    add("--minutes", type=float, default=MINUTES, help=f"for everything (default {MINUTES:g})")
    add("--dry-run", action="store_true", help="print what would run; needs no GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, of: Sequence[Part] | None = None) -> int:
    """Run the parts.

    Args:
        arguments: of the command line.
        of: the parts; None: all.

    Returns:
        0, 1 if a part failed, 2 without a GPU.
    """
    all_parts = list(of or parts())
    options = parse_arguments(arguments, [part.name for part in all_parts])
    chosen = [part for part in all_parts if not options.only or part.name in options.only]
    if options.dry_run:
        for part in chosen:
            reason = lacking(part)
            print(f"{part.name} ({f'skipped: {reason}' if reason else f'{part.seconds} s'})")
            print(f"    {shown(part)}")
        return 0
    device = find_device()
    if not device["names"]:
        print(f"No GPU to run on: {no_gpu(device)}. --dry-run shows the parts.", file=sys.stderr)
        return 2
    name = f"gpu-day-{len(device['names'])}x-{slug(device['names'][0])}.json"
    folder = options.out.resolve() if options.out else None
    day = Day((folder or RESULTS) / name, folder or LOGS, device, resume=options.resume)
    _leave_by_signals()
    run_all(chosen, day, options.minutes)
    print(f"Written: {day.path}")
    bad = [
        part.name for part in chosen if day.parts[part.name]["status"] in ("failed", "timed out")
    ]
    return 1 if bad else 0


def run_all(chosen: Sequence[Part], day: Day, minutes: float) -> None:
    """Every part in turn; one that too little time is left for is dropped by name."""
    end = time.monotonic() + 60 * minutes - RESERVE_SECONDS
    for part in chosen:
        left = end - time.monotonic()
        if day.is_done(part.name):
            print(f"{part.name}: done before", flush=True)
            continue
        if reason := lacking(part):
            day.record(part.name, {"status": f"skipped: {reason}"})
            print(f"{part.name}: skipped: {reason}", flush=True)
            continue
        grace = GRACE_SECONDS if part.grace is None else part.grace
        # Part and saving end in time; a limit cut below half would show nothing.
        limit = min(part.seconds, left - grace)
        if limit < part.seconds / 2:
            dropped = {"status": "dropped: too little time", "seconds left": max(0, round(left))}
            day.record(part.name, dropped | {"seconds needed": round(part.seconds / 2 + grace)})
        else:
            print(f"{part.name} ...", flush=True)
            day.run(part, limit)
        record = day.parts[part.name]
        print(f"{part.name}: {record['status']} ({record.get('seconds', 0)} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
