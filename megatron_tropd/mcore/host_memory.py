"""Whether the nodes of a run have the memory that its ranks are about to take."""

import socket
from typing import Any

import torch.distributed as dist

from megatron_tropd.base.host_memory import available_bytes


def shortage(need: int) -> str:
    """Say which node lacks memory, or nothing if none does.

    Args:
        need: bytes that this rank is about to take.

    Collectives: a gather of small objects.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), need, available_bytes()))
    for node in dict.fromkeys(host for host, _, _ in ranks):
        needs = [size for host, size, _ in ranks if host == node]
        left = min(free for host, _, free in ranks if host == node)
        if sum(needs) > left:
            return (
                f"the ranks on {node} ({len(needs)}) need {sum(needs) / 2**30:.1f} GiB of its "
                f"memory, and {left / 2**30:.1f} GiB are left there"
            )
    return ""
