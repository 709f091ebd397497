"""A calculator as an environment: a turn that ends in "=" is a call, any other is the answer.

start 47 times 83 add 912:      the prompt
47*83=                          the model calls
3901                            the tool answers
3901+912=                       ...
4813
answer 4813                     the model's last turn
"""

import re
from typing import Any

_CALL = re.compile(r"\s*(\d{1,9})([-+*])(\d{1,9})=\s*")


class Calculator:
    """The tool of one episode."""

    def __init__(self) -> None:
        """Nothing is calculated yet."""
        self._answer = ""
        self._calls = self._errors = 0

    def reset(self, prompt: dict[str, Any]) -> None:
        """Begin with the prompt as it is.

        Args:
            prompt: fields of its line; "answer" is the right one.
        """
        self._answer = str(prompt["answer"])

    def step(self, text: str) -> tuple[list[dict[str, str]], bool, dict[str, Any]]:
        """Calculate, or take the answer.

        Returns:
            The tool's message, whether the episode is over, and what the metrics show.
        """
        if not text.rstrip().endswith("="):
            right = text.strip() == f"answer {self._answer}"
            return [], True, self._info(correct=right)
        self._calls += 1
        return [{"role": "tool", "content": self._result(text)}], False, self._info(correct=False)

    def _result(self, text: str) -> str:
        if (call := _CALL.fullmatch(text)) is None:
            self._errors += 1
            return "error"
        first, sign, second = int(call[1]), call[2], int(call[3])
        return str({"+": first + second, "-": first - second, "*": first * second}[sign])

    def _info(self, *, correct: bool) -> dict[str, Any]:
        return {"correct": correct, "calls": self._calls, "errors": self._errors}
