"""What a process may still take of the host's memory, from files as Linux writes them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tropd.base.host_memory import available_bytes

GIB = 2**30


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node with 100 GiB to give."""
    kib = 100 * 2**20
    _write(tmp_path, {"proc/meminfo": f"MemTotal: {2 * kib} kB\nMemAvailable: {kib} kB\n"})
    return tmp_path


def _group(limit: str, used: int, files: int) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {files // 2}\nactive_file {files // 2}\n"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def test_a_node_without_limits_has_what_it_has(node: Path):
    assert available_bytes(node) == 100 * GIB


def test_the_tightest_group_above_a_process_counts_and_its_page_cache_is_free(node: Path):
    _write(node, {"proc/self/cgroup": "0::/slurm/job_7/step_0\n"})
    top = "sys/fs/cgroup/slurm"
    groups = {
        f"{top}/job_7/step_0": _group("max", 5 * GIB, 0),
        f"{top}/job_7": _group(str(40 * GIB), 30 * GIB, 8 * GIB),
        top: _group(str(90 * GIB), 30 * GIB, 0),
    }
    for group, files in groups.items():
        _write(node / group, files)
    assert available_bytes(node) == 18 * GIB
    _write(node / top / "job_7", {"memory.current": str(50 * GIB)})
    assert available_bytes(node) == 0


def test_the_older_kind_of_groups(node: Path):
    _write(node, {"proc/self/cgroup": "4:cpu,memory:/job\n3:cpuset:/job\n0::/\n"})
    files = {
        "memory.limit_in_bytes": str(20 * GIB),
        "memory.usage_in_bytes": str(12 * GIB),
        "memory.stat": f"total_inactive_file {GIB}\ntotal_active_file {GIB}\n",
    }
    _write(node / "sys/fs/cgroup/memory/job", files)
    assert available_bytes(node) == 10 * GIB


def test_this_machine_has_some():
    assert 0 < available_bytes() < 2**50


@pytest.mark.parametrize("part", [0, 1])
def test_ranks_that_share_rows_share_what_a_save_takes(part: int):
    """The first of two writes the weights; each holds its slice of the states."""
    from megatron_tropd.mcore.checkpoint import saving_bytes
    from megatron_tropd.mcore.layout import Layout

    sizes: dict[str, Any] = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
    shared = Layout(
        rank=part, world_size=2, groups=None, cp_rank=part, cp_size=2, ep_size=2, **sizes
    )
    dense, expert = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(10))
    expert.allreduce = False
    student: Any = SimpleNamespace(
        model=SimpleNamespace(trainable=lambda: {"dense": dense, "expert": expert}), average=None
    )
    weights = 4 * (100 * (part == 0) + 10)
    # Each of the two has experts of its own.
    assert saving_bytes(student, shared, "dp_reshardable") == 12 * (50 + 10) + weights
    assert saving_bytes(student, shared, None) == weights + 8 * weights // 4
    assert saving_bytes(student, shared, "fully_reshardable") == (12 + 4) * 110
