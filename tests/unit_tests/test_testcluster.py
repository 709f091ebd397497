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


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(module, "_find", lambda program: None)
    assert "apt-get install" in module.missing()
    with pytest.raises(module.ClusterError, match="apt-get install"):
        Cluster(Path("unused")).up()
