"""The arithmetic job over two nodes of a real Slurm, in the layouts `tropd slurm` writes.

Its numbers are those of the same layout on one machine without Slurm, bit for bit. A loss that is
not finite and settings that cannot be used end the job for good. ``make slurm-test``.
"""

import shutil

import pytest
import torch
from reliability import record
from safetensors.torch import load_file, save_file

from slurm.testcluster.runs import ARITHMETIC, SlurmRun

# Each wait in a test has a limit of its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("whole_suite"),
]

TENSOR_INSIDE = ("parallel.tensor=2", "parallel.data=2", "rollout.num_engines=2", "train.steps=8")
SERVED = ("parallel.tensor=2", "rollout.num_engines=2", "train.steps=24")


def test_tensor_parallel_inside_nodes_data_parallel_across(cluster, undisturbed, note, tmp_path):
    """Four ranks, an engine on each node; a launcher dies on the way."""
    with undisturbed(tmp_path / "local", *TENSOR_INSIDE) as same:
        run = SlurmRun(cluster, tmp_path / "slurm", *TENSOR_INSIDE, ranks_per_node=2)
        run.submit()
        run.reach(3)
        recovery = run.recover(lambda: run.signal("launcher", "n2"))
        assert recovery.failure["exit_code"] == 75
        assert recovery.stops < 30
        note(
            recovery,
            fault="Slurm: a launcher dies",
            how="kill -9 of `tropd distill` on the second node, with its two ranks",
            seen=f"code 75, kind {recovery.failure['kind']}; requeued",
        )
        same(run)


def test_servers_on_a_node_of_their_own(cluster, undisturbed, note, tmp_path):
    """One node trains, the other serves; a server dies, then the engine of one, then a requeue."""
    with undisturbed(tmp_path / "local", *SERVED) as same:
        separate = (*SERVED, "rollout.placement=separate")
        run = SlurmRun(cluster, tmp_path / "slurm", *separate, ranks_per_node=2)
        run.submit()
        run.reach(1)
        assert not run.processes("engine", "n1") and len(run.processes("server", "n2")) == 2
        assert not run.processes("rank", "n2") and len(run.processes("rank", "n1")) == 2
        recovery = run.recover(lambda: run.signal("server", "n2"), restart=False)
        note(
            recovery,
            fault="Slurm: a rollout server dies",
            how="kill -9 of one of two `tropd serve`",
            seen="the other server takes its requests; the job goes on and starts it again",
        )
        run.wait_for(lambda: len(run.processes("server", "n2")) == 2, "the server's next start")
        recovery = run.recover(lambda: run.signal("engine", "n2"), restart=False)
        note(
            recovery,
            fault="Slurm: the engine of a rollout server dies",
            how="kill -9 of the engine's process",
            seen="the other server takes its requests; the server starts its engine again",
        )
        recovery = run.recover(lambda: cluster.run("scontrol", "requeue", run.job))
        assert recovery.lost == 0 and not recovery.failure, "asked to stop, the run saves"
        note(
            recovery,
            fault="Slurm: requeue by the administrator",
            how="scontrol requeue, with servers",
            seen="saved and requeued; servers ended and started again",
        )
        same(run)


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
