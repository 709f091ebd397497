"""The test cluster itself: two nodes that run jobs, die, come back, and leave nothing."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.testcluster import cluster as module
from slurm.testcluster.cluster import LONGEST_FOLDER, NODES, Cluster, ClusterError

SCRIPT = Path(module.__file__)


@pytest.fixture
def submit(cluster, tmp_path) -> Callable[[str], str]:
    """``submit(body)``: a job of two nodes; returns its id. Its output is ``tmp_path / "out"``."""

    def do(body: str) -> str:
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n{body}\n")
        options = ["--requeue", "--open-mode=append", f"--output={tmp_path / 'out'}"]
        return cluster.run("sbatch", "--parsable", *options, str(script))

    return do


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for those of sockets."""
    with tempfile.TemporaryDirectory(prefix="tropd-") as folder:
        yield Path(folder)


def _await(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.05)


def _state(cluster: Cluster, job: str) -> str:
    text = cluster.run("scontrol", "show", "job", "-o", job)
    return re.search(r"JobState=(\S+)", text).group(1)


def test_a_job_runs_on_both_nodes(cluster, submit, tmp_path):
    job = submit("srun bash -c 'echo $SLURM_NODEID $SLURMD_NODENAME'")
    _await(lambda: _state(cluster, job) == "COMPLETED", "end of the job")
    assert sorted((tmp_path / "out").read_text().split()) == ["0", "1", *NODES]


def test_a_requeued_job_starts_again_and_scancel_ends_it(cluster, submit, tmp_path):
    job = submit("echo attempt ${SLURM_RESTART_COUNT:-0}\nsrun sleep 60")
    _await(lambda: len(cluster.job_processes()) >= 4, "processes on both nodes")
    cluster.run("scontrol", "requeue", job)
    _await(lambda: "attempt 1" in (tmp_path / "out").read_text(), "second attempt")
    cluster.run("scancel", job)
    _await(lambda: _state(cluster, job) == "CANCELLED", "cancelled job")
    _await(lambda: not cluster.job_processes(), "end of its processes")


def test_up_and_down_can_be_given_twice_and_leave_nothing(cluster, short):
    """A second cluster, beside the first."""
    other = Cluster(short / "other")

    def command(action: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, str(SCRIPT), action, "--folder", str(other.folder)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=300)

    try:
        for _ in range(2):
            done = command("up")
            assert done.stdout == f"export SLURM_CONF={other.config}\n", done.stderr
        assert "idle" in command("status").stdout
        other.run("sbatch", "--wrap", "sleep 60", "--output=/dev/null")
        _await(other.job_processes, "the job's processes")
    finally:
        for _ in range(2):
            assert command("down").returncode == 0
    assert not other.processes() and not other.folder.exists()
    assert (command("status").stdout, command("status").returncode) == ("down\n", 1)


def test_a_killed_owner_takes_its_cluster_and_jobs_along(short):
    folder = short / "owned"
    owner = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, time; from pathlib import Path; from slurm.testcluster.cluster import *\n"
            "with Cluster(Path(sys.argv[1])) as c:\n"
            "  c.run('sbatch', '--wrap', 'sleep 60', '--output=/dev/null'); time.sleep(60)",
            str(folder),
        ],
        cwd=SCRIPT.parents[2],
    )
    _await(lambda: Cluster(folder).job_processes() or owner.poll() is not None, "the job")
    assert owner.poll() is None, "it could not start"
    owner.kill()
    owner.wait()
    _await(lambda: not Cluster(folder).processes() and not folder.exists(), "the end of it all")


def test_a_folder_without_room_for_its_sockets_is_refused(tmp_path):
    folder = tmp_path / ("x" * LONGEST_FOLDER)
    with pytest.raises(ClusterError, match=f"at most {LONGEST_FOLDER}"):
        Cluster(folder).up()
    assert not folder.exists()
