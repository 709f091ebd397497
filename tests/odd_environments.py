"""Environments that answer, and some that do what no environment should."""

import asyncio
import os
import sys
import time
from typing import Any

Step = tuple[list[dict[str, Any]], bool, dict[str, Any]]


def say(text: Any) -> list[dict[str, Any]]:
    """One message."""
    return [{"role": "user", "content": text}]


class Echo:
    """Repeats what it hears, with the number of the turn, until ``turns``."""

    def __init__(self, turns: int = 3) -> None:
        self.turns, self.heard = turns, 0

    def reset(self, prompt: dict[str, Any]) -> list[dict[str, Any]] | None:
        return prompt.get("first")

    def step(self, text: str) -> Step:
        self.heard += 1
        info = {"heard": self.heard, "last": text, "even": self.heard % 2 == 0}
        return say(f"{self.heard} {text}"), self.heard == self.turns, info


class Slow(Echo):
    """Echo that keeps the loop of its process waiting, asynchronously."""

    async def reset(self, prompt: dict[str, Any]) -> None:
        await asyncio.sleep(0.01)

    async def step(self, text: str) -> Step:
        await asyncio.sleep(0.01)
        return super().step(text)


class Odd(Echo):
    """Echo that does as the first word of the prompt says in its second step."""

    def reset(self, prompt: dict[str, Any]) -> None:
        self.what = prompt["what"]
        if self.what == "raises at once":
            raise RuntimeError("no such game")

    def step(self, text: str) -> Any:
        said = super().step(text)
        if self.heard < 2:
            return said
        if self.what == "dies":
            os._exit(3)
        if self.what == "hangs":
            time.sleep(1000)
        if self.what == "hangs in C":
            return 9**9**9
        if self.what == "floods":
            return say("x" * 2**22), False, {}
        if self.what == "prints":
            for stream in (sys.stdout, sys.stderr):
                stream.write("x" * 2**20 + "\n")
            os.write(1, b"y" * 2**20)
        if self.what == "raises":
            raise ValueError("cannot go on")
        return _ODD.get(self.what, said)


_ODD: dict[str, Any] = {
    "half a pair": (say("\ud800"), False, {}),
    "an object": (say(object()), False, {}),
    "a number": (say(5), False, {}),
    "no tuple": [{"role": "user", "content": "x"}],
    "no messages": ("hello", False, {}),
    "nothing to say": ([], False, {}),
    "as the student": ([{"role": "assistant", "content": "x"}], False, {}),
    "done as text": (say("x"), "no", {}),
    "info as text": (say("x"), False, "fine"),
}
