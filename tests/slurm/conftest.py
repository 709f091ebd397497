"""A real Slurm for the tests of this folder, every one: where there is none they are skipped."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from machine import why_not
from reliability import record

from slurm.testcluster.cluster import Cluster
from slurm.testcluster.runs import SMALL, LocalRun, Recovery, SlurmRun, assert_same_run

ALL = "TROPD_SLURM_TESTS"
"""Set by ``make slurm-test``: all tests, and a missing Slurm is a failure."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folder decides, so that no test can forget to ask."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.needs("slurm"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Who calls for a real Slurm is not to be told that all is well without one."""
    reason = why_not("slurm")
    if reason and os.environ.get(ALL):
        pytest.fail(reason)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, up."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
        left = cluster.job_processes()
    assert not left, f"jobs left processes behind: {left}"


@pytest.fixture(scope="session")
def whole_suite() -> None:
    """For tests that take minutes: only ``make slurm-test`` runs them."""
    if not os.environ.get(ALL):
        pytest.skip(f"takes minutes; make slurm-test runs it (it sets {ALL}=1)")


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., Any]:
    """Give a context manager over (folder, *overrides), whose value compares a run with a calm one.

    That one is on this machine without Slurm, beside the block, which often only waits.
    """

    @contextmanager
    def do(folder: Path, *overrides: str) -> Iterator[Callable[[SlurmRun], None]]:
        # On a busy machine it may stand still for longer than a run that is to notice faults may.
        reference = LocalRun(folder, *overrides, "run.timeout_minutes=30")

        def same(run: SlurmRun) -> None:
            assert run.ended() == "COMPLETED"
            run.assert_nothing_left()
            assert not run.failure()
            assert reference.wait() == 0, reference.story()
            assert_same_run(run.folder, reference.folder)

        reference.start(niceness=5)
        try:
            yield same
        finally:
            reference.kill()

    return do


@pytest.fixture(scope="session")
def note() -> Callable[..., None]:
    """``note(recovery, fault=, how=, seen=)``: a row of docs/reliability.md."""

    def do(recovery: Recovery, *, fault: str, how: str, seen: str) -> None:
        # A checkpoint is complete one step after it was begun, or two.
        longest = 2 * SMALL["run"]["checkpoint_every"]
        assert recovery.lost <= longest, "more than what follows the last checkpoint"
        again = f"{recovery.lost} steps are done again" if recovery.lost else "nothing"
        record(fault, how=how, seen=seen, stops=recovery.stops, back=recovery.back, lost=again)

    return do
