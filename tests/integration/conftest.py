"""What the tests of whole runs have in common."""

import os

import pytest
from calm_run import CalmRun, calm_run


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> CalmRun:
    """The run to compare with, one for all workers."""
    folder = tmp_path_factory.getbasetemp()
    root = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    return calm_run(root / "calm")
