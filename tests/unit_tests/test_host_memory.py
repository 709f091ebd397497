"""What a process may still take of the host's memory, from files as Linux writes them."""

from pathlib import Path

import pytest

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
