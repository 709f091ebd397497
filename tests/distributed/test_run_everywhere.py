"""What ranks do together: an error that was foreseen reaches all of them, another ends its rank;
and what some of them have reaches all of them.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.base.errors import InputError, TrainingError
from tests.ranks import run_with_env


def _foreseen(rank: int) -> None:
    from megatron_tropd.data.collective import run_everywhere

    def action() -> int:
        if rank == 1:
            raise TrainingError("The engine died", kind="engine")
        return rank

    with pytest.raises(TrainingError, match="The engine died") as caught:
        run_everywhere(action)
    assert caught.value.kind == "engine"

    def misuse() -> None:
        if rank == 0:
            raise InputError("no such folder")

    with pytest.raises(InputError, match="no such folder"):
        run_everywhere(misuse)
    assert run_everywhere(lambda: rank) == [0, 1]


def _shared(rank: int) -> None:
    """What owners have, in their order; others have nothing to send."""
    from megatron_tropd.data.collective import run_and_share

    assert run_and_share(lambda: [rank] * (rank + 1), (1, 0)) == [[1, 1], [0]]
    assert run_and_share(lambda: {"from": rank}, (1,)) == [{"from": 1}]


def _unforeseen(rank: int) -> None:
    """The others are in a collective that will never end: no gather could tell them."""
    from megatron_tropd.data.collective import run_everywhere

    def action() -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        dist.all_reduce(torch.zeros(1))

    with pytest.raises(torch.OutOfMemoryError if rank == 1 else RuntimeError):
        run_everywhere(action)
    dist.destroy_process_group()  # for rank 0 what the end of rank 1 is in a run


def _both() -> None:
    dist.init_process_group("gloo")
    _foreseen(dist.get_rank())
    _shared(dist.get_rank())
    _unforeseen(dist.get_rank())


def test_errors_reach_the_ranks_they_can_reach() -> None:
    run_with_env(2, _both)
