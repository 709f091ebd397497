"""The Slurm cluster of tests where there is no Slurm, or somebody else's."""

from pathlib import Path

import pytest

from slurm.testcluster import cluster as module
from slurm.testcluster.cluster import Cluster


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    foreign = Cluster(tmp_path)
    (tmp_path / "slurm.conf").write_text("ClusterName=real\n")
    with pytest.raises(module.ClusterError, match="not a test cluster of this user"):
        foreign.up()
    foreign.down()
    assert (tmp_path / "slurm.conf").read_text() == "ClusterName=real\n"


def test_a_cluster_comes_down_where_slurm_is_no_longer_on_the_path(tmp_path, monkeypatch):
    """Tests see Slurm only if they ask for it, and the last test of a session may not."""
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\necho "$SLURM_CONF$SLURM_JOB_ID"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with monkeypatch.context() as shown:
        shown.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        cluster = Cluster(tmp_path / "cluster")
    assert cluster.run("squeue") == str(cluster.config)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(module, "_find", lambda program: None)
    assert "apt-get install" in module.missing()
    with pytest.raises(module.ClusterError, match="apt-get install"):
        Cluster(Path("unused")).up()
