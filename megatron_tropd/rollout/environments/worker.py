"""A process that holds environments: it imports their class, and a copy of it plays each episode.

python -m megatron_tropd.rollout.environments.worker FD '{"name": "my:Game", "settings": {}}'
"""

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

from megatron_tropd.base import workers
from megatron_tropd.base.parts import load_part


def main() -> None:
    """Be copied until nobody asks any more."""
    channel, settings = workers.start()
    cls = load_part("", settings["name"], attribute="", setting="environment.name")
    workers.serve_copies(channel, lambda: _Played(cls, settings["settings"]).answer)


class _Played:
    """The environment of one episode."""

    def __init__(self, cls: Any, settings: dict[str, Any]) -> None:
        self._cls, self._settings = cls, settings
        self._environment: Any = None
        self._runner = asyncio.Runner()

    def answer(self, request: dict[str, Any]) -> workers.Reply:
        """Begin the episode (``prompt``), or go on with what the student wrote (``text``)."""
        if "prompt" in request:
            self._environment = self._cls(**self._settings)
            messages = self._done(self._environment.reset(request["prompt"]))
            return {"messages": messages, "done": False, "info": {}}
        step = self._done(self._environment.step(request["text"]))
        if not isinstance(step, tuple) or len(step) != 3:
            return _refusal(f"step() must return (messages, done, info), found {step!r:.80}")
        messages, done, info = step
        if not isinstance(done, bool) or not isinstance(info, dict):
            found = f"{done!r:.40} and {info!r:.40}"
            return _refusal(f"step() must return done as bool and info as dict, found {found}")
        return {"messages": messages, "done": done, "info": info}

    def _done(self, value: Any) -> Any:
        """What a method returned, or what it promised if it is ``async``."""
        return self._runner.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _refusal(why: str) -> workers.Reply:
    return {"error": why, "kind": "refused"}


if __name__ == "__main__":
    main()
