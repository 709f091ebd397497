"""A prompt, as its file says it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts file."""

    index: int
    """0-based among the prompts of the file, or of the files of all tasks one after the other; keys
    every random draw made for this prompt."""
    text: str
    """The prompt as the model sees it (after the chat template, if any)."""
    token_ids: tuple[int, ...]
    """[L] ids of ``text``, special tokens included."""
    fields: dict[str, Any]
    """The line as read (``answer`` and whatever else the grader wants)."""
    line: int = 0
    """1-based line in the file, for errors; or another unit."""
    unit: str = "line"
    """What the file is counted in: lines, elements of an array, rows of a data set."""
    task: int = 0
    """Number of the run's task it belongs to."""

    @property
    def place(self) -> str:
        """Where it stands in its file: "line 4"."""
        return f"{self.unit} {self.line}"
