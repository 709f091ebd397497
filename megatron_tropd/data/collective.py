"""Actions that all ranks run, so that what happened on some of them is known to all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.failures import kind_of

_SHARED = (ConfigError, InputError, TrainingError, OSError)
"""Errors after which a rank can still take part in what follows."""


def run_and_share[T](action: Callable[[], T], owners: Sequence[int]) -> list[T]:
    """Run ``action`` on every rank; what it returned on each of ``owners``, on every rank.

    Raises:
        As :func:`run_everywhere`.

    Collectives: one gather of the outcome, one broadcast of objects from each owner.
    """
    mine: list[T] = []
    run_everywhere(lambda: mine.append(action()))
    shared = []
    for owner in owners:
        # Not through the gather: that takes room for every rank's share, as large as the largest.
        part = list(mine)
        dist.broadcast_object_list(part, src=owner)
        shared += part
    return shared


def run_everywhere(action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` on every rank and gather what it returned.

    Returns:
        The results, by rank.

    Raises:
        The first error, on every rank: as it was raised where it was, elsewhere as ConfigError,
        InputError, or TrainingError of the same kind. An error nobody foresaw (CUDA out of memory,
        a lost connection) is raised on its rank alone, which then has to end.

    Collectives: one gather of objects.
    """
    outcome: tuple[Any, Exception | None]
    try:
        outcome = (action(), None)
    except _SHARED as error:
        # Not any other: ``action`` may contain collectives, in which the others would wait for us
        # while we wait for them below, and the reason would never be told.
        outcome = (None, error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    # As text: not every exception survives pickling.
    met = outcome[1]
    dist.all_gather_object(outcomes, (outcome[0], met and (str(met), kind_of(met))))
    if met is not None:
        raise met
    for _, failure in outcomes:
        if failure is not None:
            raise _as_error(*failure)
    return [result for result, _ in outcomes]


def _as_error(message: str, kind: str) -> Exception:
    known = {"config": ConfigError, "input": InputError}
    return known[kind](message) if kind in known else TrainingError(message, kind=kind)
