"""A rendered job under a real Slurm, with a played ``tropd``: what Slurm does to its steps.

Seconds instead of minutes; the real ``tropd`` is in the other tests of this folder.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tropd.cluster.job_layout import make_layout
from megatron_tropd.cluster.render import render_job
from megatron_tropd.cluster.site import Site
from megatron_tropd.config import load_config

pytestmark = pytest.mark.usefixtures("whole_suite")

TROPD = """#!/bin/bash
say() { echo "$*" >>PLACE/calls; }
say "$1 $SLURMD_NODENAME step $SLURM_NODEID/$SLURM_STEP_NUM_NODES tasks $SLURM_STEP_NUM_TASKS" \
    "gpus ${CUDA_VISIBLE_DEVICES:-none} at $MASTER_ADDR token ${#TROPD_SERVER_TOKEN}" \
    "restart ${SLURM_RESTART_COUNT:-0} greeting $GREETING: ${*:2}"
sleep 100 &
trap 'say "$1 USR1"; kill $!; exit 138' USR1
trap 'say "$1 TERM"; kill $!; exit 143' TERM
source PLACE/$1
"""


class Play:
    """One job in ``folder``; what its steps do is shell in ``distill`` and ``serve``."""

    def __init__(self, cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        # As a name it is also a test of quoting, in the directives as in the shell.
        self.run = folder / "it's 50% done"
        (self.run / "logs").mkdir(parents=True)
        (folder / "venv" / "bin").mkdir(parents=True)
        tropd = folder / "venv" / "bin" / "tropd"
        tropd.write_text(TROPD.replace("PLACE", str(folder)))
        tropd.chmod(0o755)

    def submit(
        self,
        *overrides: str,
        distill: str,
        serve: str = "wait",
        partition: str = "",
        exclusive: bool = True,
    ) -> str:
        (self.folder / "distill").write_text(
            distill.replace("RUN", f'"{self.run}"').replace("PLACE", str(self.folder))
        )
        (self.folder / "serve").write_text(serve)
        config = self.run / "job.toml"
        config.write_text(f"""
            model = {{ student = "s", teacher = "t" }}
            rollout = {{ prompts = "p.jsonl", max_new_tokens = 8 }}
            train = {{ steps = 3 }}
            run = {{ dir = "{self.run}" }}
        """)
        site = Site(
            partition=partition,
            account="",
            time="20",
            gpus_per_node=8,
            gres="gpu" if exclusive else "",
            exclusive=exclusive,
            memory="",
            venv=str(self.folder / "venv"),
            environment={"GREETING": "two words"},
        )
        loaded = load_config(config, overrides)
        job = self.run / "job.sbatch"
        layout = make_layout(loaded, site)
        job.write_text(render_job(Path(loaded.run.dir), site, layout, path=config))
        return self.cluster.run("sbatch", "--parsable", str(job)).strip()

    def await_state(self, job: str, *states: str, seconds: float = 60) -> None:
        self.until(lambda: self.state(job) in states, f"{states}", seconds)

    def state(self, job: str) -> str:
        text = self.cluster.run("scontrol", "show", "job", "-o", job)
        return re.search(r"JobState=(\S+)", text).group(1)

    def until(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what}: {self.calls()}, {self.log()}"
            time.sleep(0.1)

    def calls(self, kind: str = "") -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(kind)]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in (self.run / "logs").glob("job_*.log"))


@pytest.fixture
def play(cluster, tmp_path) -> Play:
    return Play(cluster, tmp_path)


def test_colocated_one_task_on_each_node(play):
    job = play.submit("parallel.tensor=8", "parallel.data=2", distill="touch RUN/summary.json")
    play.await_state(job, "COMPLETED")
    rest = (
        f"gpus .* at .* token 64 restart 0 greeting two words: {re.escape(str(play.run))}/job.toml"
    )
    for node, line in enumerate(sorted(play.calls("distill"))):
        assert re.fullmatch(rf"distill n{node + 1} step {node}/2 tasks 2 {rest}", line), line
    logs = {path.name for path in (play.run / "logs").iterdir()}
    assert logs == {f"job_{job}.log", f"job_{job}_node_0.log", f"job_{job}_node_1.log"}
    assert "complete" in play.log()


def test_separate_servers_beside_each_other_with_gpus_of_their_own(play):
    job = play.submit(
        *("parallel.tensor=8", "rollout.placement=separate", "rollout.num_engines=3"),
        "rollout.engine_tensor_parallel=2",
        distill="until (($(grep -c '^serve n2' PLACE/calls) == 3)); do sleep 0.1; done\n"
        "touch RUN/summary.json",
    )
    play.await_state(job, "COMPLETED")
    servers = sorted(line.split("--number ")[1] + line for line in play.calls("serve n2"))
    gpus = [re.search(r"gpus (\S+)", line).group(1) for line in servers]
    assert gpus == ["0,1", "2,3", "4,5"]
    (trainer,) = play.calls("distill")
    assert trainer.startswith("distill n1 step 0/1 ")
    play.until(lambda: play.calls().count("serve TERM") == 3, "end of the servers")


def test_a_job_of_more_weight_gets_the_nodes_and_the_run_goes_on_after_it(play):
    """Slurm leaves a preempted job time to save, and requeues none that ends in this time."""
    job = play.submit(
        *("parallel.tensor=8", "parallel.data=2"),
        partition="low",
        distill='((SLURM_RESTART_COUNT)) && touch RUN/summary.json && exit 0\nwait "$!"',
    )
    play.until(lambda: len(play.calls("distill n")) == 2, "steps")
    options = ("--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    other = play.cluster.run("sbatch", *options)
    play.await_state(other, "COMPLETED")
    play.await_state(job, "COMPLETED")
    assert play.calls().count("distill TERM") == 2
    assert sum("restart 1" in line for line in play.calls("distill n")) == 2
    assert "preempted: Slurm needs these nodes" in play.log()


def test_a_second_job_of_a_run_is_refused(play):
    """Submitted by hand: `tropd slurm --submit` looks into the queue before."""
    job = play.submit("parallel.tensor=8", distill='wait "$!"', exclusive=False)
    play.until(lambda: play.calls("distill n"), "step")
    second = play.cluster.run("sbatch", "--parsable", str(play.run / "job.sbatch"))
    play.await_state(second, "FAILED")
    assert f"refused: job {job} works on" in play.log()
    assert play.state(job) == "RUNNING" and len(play.calls("distill n")) == 1
    play.cluster.run("scancel", job)
    play.await_state(job, "CANCELLED")


def test_scancel_reaches_the_run_and_is_the_end(play):
    job = play.submit("parallel.tensor=8", distill='wait "$!"')
    play.until(lambda: play.calls("distill n1"), "step")
    play.cluster.run("scancel", job)
    play.await_state(job, "CANCELLED")
    play.until(lambda: "distill TERM" in play.calls(), "TERM")
    play.until(lambda: "cancelled" in play.log(), "word of it")
    assert "Restarts=0" in play.cluster.run("scontrol", "show", "job", job)
