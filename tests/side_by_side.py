"""How workers of pytest-xdist share the files of the suite.

Every worker takes the next whole file: the longest first, then in the order of ``testpaths``, which
ends with the short unit tests. So no worker is left alone with a long file. There are more workers
than cores: a test that starts ranks, engines or whole runs waits for a third of its time.
"""

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

ALONE = ("tests/slurm", "tests/gpu")
"""A folder is one unit if its files share what this machine has once: the test cluster, the GPU."""
LONGEST = (
    "tests/distributed/test_megatron_lm_pretrain.py",
    "tests/integration/test_main_job.py",
    "tests/unit_tests/test_rehearsed_recipes.py",
    "tests/distributed/test_losses.py",
    "tests/integration/test_faults.py",
    "tests/integration/test_live_rollouts.py",
    "tests/distributed/test_training.py",
    "tests/distributed/test_megatron_options.py",
    "tests/distributed/test_mixtures.py",
    "tests/integration/test_served_rollouts.py",
    "tests/distributed/test_checkpoint.py",
    "tests/distributed/test_logits.py",
    "tests/unit_tests/test_dense_triton.py",
    "tests/integration/test_methods.py",
)
"""More than a minute each, as ``--durations`` of a whole run shows."""


def place(unit: str) -> int:
    """Of a file or folder in the queue; equal places keep their order."""
    return LONGEST.index(unit) if unit in LONGEST else len(LONGEST)


class LongestFirst(LoadFileScheduling):
    """Give whole files, the longest first."""

    def _split_scope(self, nodeid: str) -> str:
        folders = (name for name in ALONE if nodeid.startswith(f"{name}/"))
        return next(folders, super()._split_scope(nodeid))

    def _assign_work_unit(self, node: WorkerController) -> None:
        self.workqueue.move_to_end(min(self.workqueue, key=place), last=False)
        super()._assign_work_unit(node)
