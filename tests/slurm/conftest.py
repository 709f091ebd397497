"""A real Slurm for the tests of this folder; where there is none they are skipped."""

import os
from collections.abc import Iterator

import pytest

from slurm.testcluster.cluster import Cluster, missing

ALL = "TROPD_SLURM_TESTS"
"""Set by ``make slurm-test``: all tests, and a missing Slurm is a failure."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, up."""
    reason = missing()
    if reason and os.environ.get(ALL):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
        left = cluster.job_processes()
    assert not left, f"jobs left processes behind: {left}"


@pytest.fixture(scope="session")
def whole_suite() -> None:
    """For tests that take minutes: only ``make slurm-test`` runs them."""
    if not os.environ.get(ALL):
        pytest.skip(f"takes minutes; make slurm-test runs it (it sets {ALL}=1)")
