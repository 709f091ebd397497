"""How workers of pytest-xdist share the files of the suite.

The first takes files from the front, the others from the back. The front (``testpaths``) are tests
that start ranks, engines and whole runs, and wait a lot; the back are unit tests, which compute. So
no core idles while the other side waits, and no two runs meet before the unit tests are done.
"""

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ALONE = ("tests/slurm", "tests/gpu")
"""A folder is one unit if its files share what this machine has once: the test cluster, the GPU."""


class FromBothEnds(LoadFileScheduling):
    """Give whole files as they were collected, to the first worker from the front."""

    def __init__(self, config: pytest.Config, log) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        folders = (name for name in ALONE if nodeid.startswith(f"{name}/"))
        return next(folders, super()._split_scope(nodeid))

    def _assign_work_unit(self, node: WorkerController) -> None:
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
