"""What breaks on a cluster, broken under a real Slurm: the job goes on and no number changes.

One run over two nodes meets one fault after the other, each in a test of its own; the last test
compares it with the same run done in peace. Two more faults are met in ``test_slurm_layouts.py``.
``make slurm-test``.
"""

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from reliability import record

from slurm.testcluster.cluster import DOWN_AFTER_SECONDS
from slurm.testcluster.runs import (
    WARNING_SECONDS,
    SlurmRun,
    fill,
    remount,
    small_file_system,
)

# Each wait in a test has a limit of its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("whole_suite"),
]

STEPS = 700
"""Two faults take Slurm up to half a minute to notice, in which the run goes on: 300 steps."""
LAYOUT = (
    *("parallel.tensor=1", "parallel.pipeline=2", "rollout.num_engines=1"),
    *(f"train.steps={STEPS}", "run.timeout_minutes=0.4"),
)


@pytest.fixture(scope="module")
def same(undisturbed, tmp_path_factory) -> Iterator[Callable[[SlurmRun], None]]:
    """``same(run)``: it ended as the run that nothing happened to."""
    with undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", *LAYOUT) as same:
        yield same


@pytest.fixture(scope="module")
def run(cluster, same, tmp_path_factory) -> Iterator[SlurmRun]:
    """The run that meets everything; its checkpoints lie on a small file system of their own."""
    run = SlurmRun(cluster, tmp_path_factory.mktemp("faults") / "run", *LAYOUT)
    with small_file_system(run.folder / "checkpoints", "48m"):
        try:
            run.submit()
            yield run
        finally:
            cluster.run("scancel", run.job, check=False)
            run.assert_nothing_left()


@pytest.fixture(autouse=True)
def two_steps_later(run) -> None:
    """So that every fault meets a run that is under way."""
    if not run.is_over():
        run.reach(run.step() + 2)


def test_a_rank_dies(run, note):
    recovery = run.recover(lambda: run.signal("rank", "n2"))
    assert recovery.failure["kind"] == "killed" and recovery.failure["rank"] == 1
    assert recovery.stops < 30
    log = (run.folder / "logs" / f"job_{run.job}_node_0.log").read_text()
    assert recovery.failure["message"] in log, "node 0 says why, before srun ends it"
    note(
        recovery,
        fault="Slurm: a rank dies",
        how="kill -9 of the rank on the second node",
        seen="code 75; rank, signal, step and phase in failure.json; requeued",
    )


def test_an_engine_dies(run, note):
    recovery = run.recover(lambda: run.signal("engine", "n1"))
    assert recovery.failure["kind"] == "engine"
    note(
        recovery,
        fault="Slurm: a colocated engine dies",
        how="kill -9 of the engine's process",
        seen="code 75; the engine's number and signal in failure.json; requeued",
    )


def test_a_node_is_lost(run, cluster, note):
    """Its slurmd is silent: Slurm takes the node down, requeues the job and waits for the node."""
    recovery = run.recover(lambda: cluster.kill_node("n2"), heal=lambda: cluster.start_node("n2"))
    note(
        recovery,
        fault="Slurm: slurmd of a node dies",
        how=f"kill -9 of slurmd (SlurmdTimeout {DOWN_AFTER_SECONDS} s), later started again",
        seen="node down; Slurm requeues the job; it starts when the node is back",
    )


def test_the_time_is_up(run, cluster, note):
    def set_limit(minutes: int) -> None:
        cluster.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")

    def hurry() -> None:
        hours, minutes, _ = (int(part) for part in run.about()["RunTime"].split(":"))
        set_limit(60 * hours + minutes + WARNING_SECONDS // 60 - 1)

    recovery = run.recover(hurry, heal=lambda: set_limit(30))
    assert recovery.lost == 0 and not recovery.failure
    note(
        recovery,
        fault="Slurm: the time limit",
        how=f"time limit lowered to less than the warning of {WARNING_SECONDS} s",
        seen="saved and requeued (Slurm looks at limits every 30 s)",
    )


def test_a_rank_stands_still(run, note):
    recovery = run.recover(lambda: run.signal("rank", "n2", signal.SIGSTOP))
    assert recovery.failure["kind"] == "hung" and recovery.failure["rank"] == 1
    note(
        recovery,
        fault="Slurm: a hung collective",
        how="SIGSTOP of the rank on the second node, `run.timeout_minutes = 0.4`",
        seen="code 75; the rank that stands still, step and phase in failure.json; requeued",
    )


def test_the_file_system_is_full(run, note):
    ballast = run.folder / "checkpoints" / "ballast"

    recovery = run.recover(lambda: fill(ballast), heal=ballast.unlink)
    assert recovery.failure["kind"] == "disk"
    note(
        recovery,
        fault="Slurm: checkpoints' file system full",
        how="a file system of 48 MiB filled up; room is made after the failure",
        seen="code 75; path and free space in failure.json; requeued",
    )


def test_the_file_system_is_read_only(run, note):
    disk = run.folder / "checkpoints"
    recovery = run.recover(lambda: remount(disk, "ro"), heal=lambda: remount(disk, "rw"))
    assert recovery.failure["kind"] == "disk"
    note(
        recovery,
        fault="Slurm: checkpoints' file system read-only",
        how="mount -o remount,ro; writable again after the failure",
        seen="code 75; path and reason in failure.json; requeued",
    )


def test_a_run_in_the_queue_is_not_submitted_again(run):
    with pytest.raises(AssertionError, match=f"Job {run.job} of this run is RUNNING already"):
        run.submit()


def test_scancel_saves_and_the_job_file_resumes(run, cluster):
    start = time.monotonic()
    cluster.run("scancel", run.job)
    assert run.ended() == "CANCELLED"
    run.assert_nothing_left()
    stops = round(time.monotonic() - start, 1)
    newest = max(path.name for path in (run.folder / "checkpoints").glob("step_*"))
    assert newest == f"step_{run.step():06d}" and run.step() < STEPS
    step, start = run.step(), time.monotonic()
    run.submit()
    run.reach(step + 1)
    back = round(time.monotonic() - start, 1)
    record(
        "Slurm: scancel",
        how="scancel, then the same job submitted again",
        seen="saved; cancelled, not requeued; nothing left running",
        stops=stops,
        back=back,
        lost="nothing",
    )


def test_all_that_changed_no_bit(run, same):
    same(run)
