"""A treasure hunt on a grid: an environment to copy for one's own.

The prompt's line says which map ("seed", a number) and how large it is ("size"); the environment
writes the first message, the model answers with a direction, and hears what it bumps into. A class
needs no base and no import of ours. Each episode has an object, and a process, of its own.
"""

import random
import re
from typing import Any

Message = dict[str, str]
Place = tuple[int, int]
_MOVES: dict[str, Place] = {"north": (0, -1), "south": (0, 1), "west": (-1, 0), "east": (1, 0)}
_RULES = (
    "You are on a grid of {size} by {size} fields, x to the east, y to the south. Find the "
    "treasure. Answer with one word: north, south, west or east."
)


class GridWorld:
    """One hunt."""

    def __init__(self, walls: float = 0.2, most_steps: int = 20) -> None:
        """Take what ``environment.settings`` of the TOML says.

        Args:
            walls: share of the fields that cannot be entered.
            most_steps: moves until the hunt is lost.
        """
        self.walls_share, self.most_steps = walls, most_steps
        self.size = self.steps = 0
        self.here = self.treasure = (0, 0)
        self.walls: set[Place] = set()

    def reset(self, prompt: dict[str, Any]) -> list[Message]:
        """Lay out the map, and begin the conversation.

        Args:
            prompt: the line of the prompts file; drawing from its seed alone makes the same map
                in each run.

        Returns:
            The first messages, or None for those of the prompt.
        """
        rng, self.size = random.Random(int(prompt["seed"])), int(prompt.get("size", 4))
        fields = [(x, y) for x in range(self.size) for y in range(self.size)]
        self.here, self.treasure, *others = rng.sample(fields, len(fields))
        self.walls = set(others[: int(self.walls_share * len(fields))])
        return [{"role": "user", "content": f"{_RULES.format(size=self.size)}\n{self._sight()}"}]

    def step(self, text: str) -> tuple[list[Message], bool, dict[str, Any]]:
        """Move, as far as the words say where.

        Args:
            text: what the model wrote in its turn.

        Returns:
            What it is told, whether the hunt is over, and numbers for the metrics.
        """
        self.steps += 1
        said = self._move(text)
        found = self.here == self.treasure
        done = found or self.steps == self.most_steps
        info = {"found": found, "steps": self.steps, "distance": self._distance()}
        return [{"role": "user", "content": f"{said} {self._sight()}"}], done, info

    def _move(self, text: str) -> str:
        words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in _MOVES]
        if not words:
            return "That is no direction."
        x, y = (a + b for a, b in zip(self.here, _MOVES[words[-1]], strict=True))
        inside = 0 <= x < self.size and 0 <= y < self.size
        if not inside or (x, y) in self.walls:
            return "There is a wall."
        self.here = (x, y)
        return f"You go {words[-1]}."

    def _sight(self) -> str:
        return f"You are at {self.here}, the treasure at {self.treasure}."

    def _distance(self) -> int:
        return sum(abs(a - b) for a, b in zip(self.here, self.treasure, strict=True))
