"""The arithmetic job over two nodes of a real Slurm, in the layouts `tropd slurm` writes.

Its numbers are those of the same layout on one machine without Slurm, bit for bit. A loss that is
not finite and settings that cannot be used end the job for good. ``make slurm-test``.
"""

import shutil

import pytest
import torch
from reliability import record
from safetensors.torch import load_file, save_file

from slurm.testcluster.runs import ARITHMETIC, LocalRun, SlurmRun, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("whole_suite")]

TENSOR_INSIDE = ("parallel.tensor=2", "parallel.data=2", "rollout.num_engines=2", "train.steps=8")
SERVED = ("parallel.tensor=2", "rollout.num_engines=2", "train.steps=24")


def test_tensor_parallel_inside_nodes_data_parallel_across(cluster, tmp_path):
    """Four ranks, an engine on each node; one rank dies on the way."""
    run = SlurmRun(cluster, tmp_path / "slurm", *TENSOR_INSIDE, ranks_per_node=2)
    run.submit()
    run.reach(3)
    recovery = run.recover(lambda: run.signal("rank", "n2"))
    assert recovery.failure["kind"] == "killed" and recovery.failure["rank"] in (2, 3)
    assert run.ended() == "COMPLETED"
    run.assert_nothing_left()
    local = LocalRun(tmp_path / "local", *TENSOR_INSIDE)
    local.complete()
    assert_same_run(run.folder, local.folder)


def test_servers_on_a_node_of_their_own(cluster, tmp_path):
    """One node trains, the other serves; a server dies, then the engine of one, then a rank."""
    separate = (*SERVED, "rollout.placement=separate")
    run = SlurmRun(cluster, tmp_path / "slurm", *separate, ranks_per_node=2)
    run.submit()
    run.reach(1)
    assert not run.processes("engine", "n1") and len(run.processes("server", "n2")) == 2
    assert not run.processes("rank", "n2") and len(run.processes("rank", "n1")) == 2
    recovery = run.recover(lambda: run.signal("server", "n2"), restart=False)
    record(
        "Slurm: a rollout server dies",
        how="kill -9 of one of two `tropd serve`",
        seen="the other server takes its requests; the job goes on and starts it again",
        stops=None,
        back=recovery.back,
        lost="nothing",
    )
    run.wait_for(lambda: len(run.processes("server", "n2")) == 2, "the server's next start")
    recovery = run.recover(lambda: run.signal("engine", "n2"), restart=False)
    record(
        "Slurm: the engine of a rollout server dies",
        how="kill -9 of the engine's process",
        seen="the other server takes its requests; the server starts its engine again",
        stops=None,
        back=recovery.back,
        lost="nothing",
    )
    recovery = run.recover(lambda: run.signal("rank", "n1"))
    assert recovery.failure["kind"] == "killed"
    assert run.ended() == "COMPLETED"
    run.assert_nothing_left()
    local = LocalRun(tmp_path / "local", *SERVED)
    local.complete()
    assert_same_run(run.folder, local.folder)


def test_a_loss_that_is_not_finite_is_not_tried_again(cluster, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(ARITHMETIC / "teacher", teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    alone = ("parallel.tensor=1", "rollout.num_engines=1", "train.steps=4")
    run = SlurmRun(cluster, tmp_path / "run", *alone, f"model.teacher={teacher}")
    run.submit()
    assert run.ended() == "FAILED"
    about, failure = run.about(), run.failure()
    assert (about["Restarts"], about["ExitCode"]) == ("0", "1:0")
    assert failure["kind"] == "training" and failure["step"] == 1
    assert "not finite" in failure["message"]
    run.assert_nothing_left()
    record(
        "Slurm: a loss that is not finite",
        how="a teacher whose last norm is NaN",
        seen="code 1; step and trajectory in failure.json; not requeued; weights not updated",
        stops=None,
        back=None,
        lost="nothing",
    )
