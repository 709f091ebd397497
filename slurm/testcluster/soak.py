"""A long run with a random fault every so many steps, and what is left of the difference: nothing.

    python -m slurm.testcluster.soak [--steps 500 --every 20 --seed 1] [--slurm] [--write]

Does the small arithmetic run twice: once in peace, once with faults, started again after each
(``--slurm``: as a job of the test cluster, which starts again by itself). Fails unless metrics and
trained student agree bit for bit, every stop had the reason it should have, and nothing stopped
without a fault. Faults, steps and victims are drawn from the seed. ``--write``: the result goes to
``benchmarks/results/soak-<hardware>.json``. Ctrl-C and SIGTERM end the runs and leave nothing.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.step import commit, describe_hardware, our_packages
from slurm.testcluster.cluster import NODES, Cluster, missing
from slurm.testcluster.runs import (
    REPOSITORY,
    LocalRun,
    Recovery,
    SlurmRun,
    assert_same_run,
    fill,
    remount,
    small_file_system,
)

LAYOUT = (
    *("parallel.tensor=1", "parallel.pipeline=2", "rollout.num_engines=1"),
    *("rollout.max_new_tokens=16", "run.timeout_minutes=1.5"),
)
DISK_SIZE = "48m"
REASONS: dict[str, tuple[str | None, ...]] = {
    "rank killed": ("killed",),
    # Alone, a launcher takes the ranks along and nobody is left to write.
    "launcher killed": (None, "killed", "lost_peer"),
    "engine killed": ("engine",),
    "asked to stop": (None,),
    "rank stopped": ("hung",),
    "disk full": ("disk",),
    "disk read-only": ("disk",),
    "slurmd killed": (None, "killed", "lost_peer"),
}
"""Faults, and what ``failure.json`` may call them; None: no file."""

Fault = tuple[Callable[[], None], Callable[[], None]]
"""What happens, and how it is undone before the next start."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of the run (default 500)")
    parser.add_argument("--every", type=int, default=20, help="steps per fault (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of faults, steps and victims")
    parser.add_argument("--slurm", action="store_true", help="as a job of the test cluster")
    parser.add_argument("--write", action="store_true", help="keep the result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, compare, report; 0 if nothing differs."""
    options = parse_arguments(arguments)
    if options.slurm and (reason := missing()):
        sys.exit(f"soak: {reason}")
    # As an exception it passes through everything that has to be cleared up.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tropd-soak-") as name:
        peace = LocalRun(Path(name) / "peace", *LAYOUT, f"train.steps={options.steps}")
        with ExitStack() as exits:
            exits.callback(peace.kill)
            peace.complete()
        seconds_in_peace = time.monotonic() - started
        folder, recoveries = soak(options, Path(name))
        assert_same_run(folder, peace.folder)
    wrong = [r for _, fault, r in recoveries if r.failure.get("kind") not in REASONS[fault]]
    assert not wrong, f"other reasons than those faults have: {wrong}"
    seconds = time.monotonic() - started - seconds_in_peace
    result = describe(options, recoveries, seconds_in_peace, seconds)
    print(json.dumps(result, indent=2))
    if options.write:
        hardware, _ = describe_hardware()
        where = "slurm-" if options.slurm else ""
        path = REPOSITORY / "benchmarks" / "results" / f"soak-{where}{hardware}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Written to {path}")
    return 0


def soak(options: argparse.Namespace, root: Path) -> tuple[Path, list[tuple[int, str, Recovery]]]:
    """The run with faults.

    Args:
        options: the command line.
        root: scratch space.

    Returns:
        Its folder, and (step, fault, what it cost) in order.
    """
    draw, recoveries, faults = random.Random(options.seed), [], list[str]()
    with ExitStack() as exits:
        overrides, is_root = (*LAYOUT, f"train.steps={options.steps}"), os.geteuid() == 0
        if is_root:
            disk = root / "run" / "checkpoints"
            exits.enter_context(small_file_system(disk, DISK_SIZE))
        run: LocalRun | SlurmRun
        if options.slurm:
            cluster = exits.enter_context(Cluster(root / "slurm"))
            run = SlurmRun(cluster, root / "run", *overrides)
            run.submit()
        else:
            run = LocalRun(root / "run", *overrides)
            exits.callback(run.kill)
            run.start()
        for begin in range(0, options.steps - options.every, options.every):
            step = begin + draw.randint(2, options.every)
            # Each once before any comes again.
            faults = faults or fault_names(on_slurm=options.slurm, is_root=is_root)
            name = faults.pop(draw.randrange(len(faults)))
            run.reach(step)
            break_it, heal = make_fault(name, run, draw)
            recovery = run.recover(break_it, heal=heal)
            recoveries.append((step, name, recovery))
            print(f"step {step}: {name}: {recovery}", flush=True)
        run.wait_for((run.folder / "summary.json").exists, "summary")
        run.wait_for(run.is_over, "end", may_end=True)
        if isinstance(run, SlurmRun):  # alone, a run that ends by itself is noticed at once
            assert run.restarts() == len(recoveries), "it was requeued without a fault"
    return run.folder, recoveries


def fault_names(*, on_slurm: bool, is_root: bool) -> list[str]:
    """What may happen: those of :data:`REASONS` that can be produced here."""
    return [
        name
        for name in REASONS
        if (is_root or not name.startswith("disk")) and (on_slurm or name != "slurmd killed")
    ]


def make_fault(name: str, run: LocalRun | SlurmRun, draw: random.Random) -> Fault:
    """Prepare one fault.

    Args:
        name: one of :func:`fault_names`.
        run: under way.
        draw: who is hit.
    """
    which, node = draw.randrange(2), draw.choice(NODES)
    disk = run.folder / "checkpoints"

    def nothing() -> None:
        pass

    def ask_to_stop() -> None:
        if isinstance(run, SlurmRun):
            run.cluster.run("scontrol", "requeue", run.job)
        else:
            run.signal("launcher", number=signal.SIGTERM)

    def start_node() -> None:
        assert isinstance(run, SlurmRun)
        run.cluster.start_node(node)

    def kill_node() -> None:
        assert isinstance(run, SlurmRun)
        run.cluster.kill_node(node)

    faults: dict[str, Fault] = {
        "rank killed": (lambda: run.signal("rank", which=which), nothing),
        "launcher killed": (lambda: run.signal("launcher", which=which), nothing),
        "engine killed": (lambda: run.signal("engine", which=which), nothing),
        "rank stopped": (lambda: run.signal("rank", which=which, number=signal.SIGSTOP), nothing),
        "asked to stop": (ask_to_stop, nothing),
        "disk full": (lambda: fill(disk / "ballast"), lambda: (disk / "ballast").unlink()),
        "disk read-only": (lambda: remount(disk, "ro"), lambda: remount(disk, "rw")),
        "slurmd killed": (kill_node, start_node),
    }
    return faults[name]


def describe(
    options: argparse.Namespace,
    recoveries: list[tuple[int, str, Recovery]],
    seconds_in_peace: float,
    seconds: float,
) -> dict[str, Any]:
    """The result, JSON-ready."""
    _, hardware = describe_hardware()
    flags = " --slurm" if options.slurm else ""
    return {
        "hardware": hardware,
        "command": f"python -m slurm.testcluster.soak --steps {options.steps} --every "
        f"{options.every} --seed {options.seed}{flags}",
        **commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in our_packages()},
        "steps": options.steps,
        "seconds_in_peace": round(seconds_in_peace, 1),
        "seconds": round(seconds, 1),
        "faults": dict(Counter(name for _, name, _ in recoveries)),
        "steps_done_again": sum(recovery.lost for _, _, recovery in recoveries),
        "difference": "none, bit for bit: metrics of every step, trained student",
        "each": [
            {
                "step": step,
                "fault": name,
                "seconds_to_stop": recovery.stops,
                "seconds_to_next_new_step": recovery.back,
                "steps_done_again": recovery.lost,
                "kind": recovery.failure.get("kind"),
            }
            for step, name, recovery in recoveries
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
