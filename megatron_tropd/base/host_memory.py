"""How much of the host's memory this process may still take. Standard library only."""

from collections.abc import Iterator
from pathlib import Path

_NAMES = {
    "v2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "v1": (
        *("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
}
"""Files of a control group: limit, usage; and which of ``memory.stat`` the kernel gives up."""


def available_bytes(root: Path = Path("/")) -> int:
    """What is free or can be given up, of the node and within this process' control groups.

    Args:
        root: where /proc and /sys are.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    of_node = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    return max(0, min([of_node, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group that limits this process has left."""
    for version, group in _groups(root):
        limit, usage, files = _NAMES[version]
        try:
            most = (group / limit).read_text().strip()
            if most == "max":
                continue
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / usage).read_text()) - sum(int(stat.get(f, 0)) for f in files)
        except (OSError, ValueError):  # a container shows no more than its own groups
            continue
        yield int(most) - used


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """The memory groups of this process, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            version, top = "v2", mounted
        elif "memory" in controllers.split(","):
            version, top = "v1", mounted / "memory"
        else:
            continue
        inner = top / path.lstrip("/")
        yield version, inner
        yield from ((version, outer) for outer in inner.parents if outer.is_relative_to(top))
