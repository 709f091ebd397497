"""Several tasks in one run: whose a prompt is, and which prompts a step takes of each."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.data.prompts import permutation
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses.draws import Purpose, keyed_seed, keyed_uniform


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, by number."""

    names: tuple[str, ...]
    firsts: tuple[int, ...]
    """``Prompt.index`` of each one's first prompt."""
    places: tuple[NDArray[np.int64], ...]
    """Of each one's prompts among all of them."""
    weights: tuple[float, ...]

    def of_index(self, index: int) -> int:
        """Find the task of a ``Prompt.index``."""
        return bisect_right(self.firsts, index) - 1

    def of(self, sequences: Sequence[TokenSequence]) -> list[int]:
        """Find the task of each sequence."""
        return [self.of_index(sequence.key.prompt) for sequence in sequences]


def most_of_a_step(weight: float, total: float, per_step: int) -> int:
    """Count the prompts that a step may take of a task: its share, and what rounding adds."""
    return min(per_step, int(np.floor(per_step * weight / total)) + 1)


class Mixing:
    """Chooses the prompts of each step. Nothing is saved: all of it follows from the seed.

    A step takes of each task its share, rounded up or down by one keyed draw, so that the mean over
    steps is the share exactly. A task goes through its prompts by a keyed permutation per epoch.
    What is left of one that a step's number exceeds sits that epoch out: no step sees a prompt
    twice.
    """

    def __init__(self, tasks: Tasks, *, per_step: int, seed: int) -> None:
        """Begin before the first step.

        Raises:
            ConfigError: a task has fewer prompts than a step may take of it.
        """
        self._tasks, self._per_step, self._seed = tasks, per_step, seed
        total = sum(tasks.weights)
        for name, weight, places in zip(tasks.names, tasks.weights, tasks.places, strict=True):
            most = most_of_a_step(weight, total, per_step)
            if most > len(places):
                raise ConfigError(
                    f"A step may take {most} of rollout.prompts_per_step = {per_step} prompts of "
                    f"the task {name}, which has {len(places)}. Lower one of the two or its weight."
                )
        self._edges = np.append(np.cumsum(tasks.weights)[:-1] / total, 1.0)
        self._step = 0
        """The next whose epochs and places are known."""
        self._reached = [(0, 0) for _ in tasks.names]
        """Epoch and place in it of each task, before that step."""

    def __call__(self, step: int) -> list[int]:
        """Choose the places of a step's prompts among all prompts, tasks in a keyed order."""
        if step < self._step:
            self._step, self._reached = 0, [(0, 0) for _ in self._tasks.names]
        while self._step < step:
            counts = self._counts(self._step)
            self._reached = [
                (epoch, place + count) for (epoch, place), count in self._starts(counts)
            ]
            self._step += 1
        chosen: list[int] = []
        for task, ((epoch, place), count) in enumerate(self._starts(self._counts(step))):
            mine = self._tasks.places[task]
            seed = keyed_seed(self._seed, Purpose.TASK, task)
            order = permutation(len(mine), epoch, seed)
            chosen += mine[order[place : place + count]].tolist()
        key = keyed_seed(self._seed, Purpose.TASK)
        draws = keyed_uniform(key, step, 1, np.arange(len(chosen)))
        return [chosen[i] for i in np.argsort(draws, kind="stable")]

    def _counts(self, step: int) -> list[int]:
        """How many prompts a step takes of each task."""
        draw = float(keyed_uniform(keyed_seed(self._seed, Purpose.TASK), step, 0, 0))
        # Points at distance 1 from each other, moved by one draw: each task gets those within.
        ends = np.ceil(self._edges * self._per_step - draw).astype(int)
        counts: list[int] = np.diff(ends, prepend=0).tolist()
        return counts

    def _starts(self, counts: Sequence[int]) -> list[tuple[tuple[int, int], int]]:
        """Epoch and place from which a step takes its number of each task."""
        starts = []
        for (epoch, place), places, count in zip(
            self._reached, self._tasks.places, counts, strict=True
        ):
            fits = place + count <= len(places)
            starts.append(((epoch, place) if fits else (epoch + 1, 0), count))
        return starts
