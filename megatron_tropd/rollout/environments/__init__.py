"""The environments of a step's episodes, each in a process of its own, with limits."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import torch.distributed as dist

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.workers import Worker, WorkerCopy, WorkerError
from megatron_tropd.config import Config, EnvironmentConfig
from megatron_tropd.data.collective import run_everywhere

_MODULE = "megatron_tropd.rollout.environments.worker"


@dataclass(frozen=True)
class EnvironmentCall:
    """What an environment is asked."""

    prompt: Mapping[str, Any] | None = None
    """Fields of the prompt's line: the episode begins."""
    text: str = ""
    """What the student wrote in its turn."""


@dataclass(frozen=True)
class EnvironmentReply:
    """What it says."""

    messages: Any = None
    """What it gave as such; None: none."""
    done: bool = False
    """Whether the episode is over."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else it says."""
    failure: str = ""
    """One of ``workers.Kind`` if it failed."""
    error: str = ""
    """Why."""


class Environments:
    """Those of the episodes that begin in this process."""

    def __init__(self, config: EnvironmentConfig) -> None:
        """Start nothing yet."""
        self._config = config
        self._origin: Worker | None = None
        self._copies: dict[int, WorkerCopy] = {}

    def answer(self, calls: Mapping[int, EnvironmentCall]) -> dict[int, EnvironmentReply]:
        """Ask the environments of some episodes at once.

        Raises:
            ConfigError: the class cannot be imported.
        """
        if calls:
            self.start()
        with ThreadPoolExecutor(self._config.workers) as threads:
            return dict(
                zip(
                    calls,
                    threads.map(self.answer_one, *zip(*calls.items(), strict=True)),
                    strict=True,
                )
            )

    def start(self) -> None:
        """Import the class, unless that has been done.

        Raises:
            ConfigError: it cannot be imported.
        """
        if self._origin is None:
            self._origin = self._start()

    def end(self, episode: int) -> None:
        """End the environment of an episode, if it has begun."""
        if copy := self._copies.pop(episode, None):
            copy.close()

    def close(self) -> None:
        """End all of them."""
        for episode in list(self._copies):
            self.end(episode)
        if self._origin is not None:
            self._origin.close()
            self._origin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Worker:
        config = self._config
        try:
            return Worker(_MODULE, {"name": config.name, "settings": config.settings})
        except WorkerError as error:
            raise ConfigError(
                f"environment.name = {config.name!r} cannot be started: {error}. Import the module "
                "in a Python of your own to see why."
            ) from None

    def answer_one(self, episode: int, call: EnvironmentCall) -> EnvironmentReply:
        """Ask the environment of one episode; any thread may."""
        request = {"text": call.text} if call.prompt is None else {"prompt": dict(call.prompt)}
        try:
            if call.prompt is not None:
                assert self._origin is not None
                self.end(episode)  # of a step that was given up
                self._copies[episode] = self._origin.copy()
            reply = self._copies[episode].request(request, self._config.timeout_seconds)
        except WorkerError as error:
            self.end(episode)
            return EnvironmentReply(failure=error.kind, error=" ".join(str(error).split())[:300])
        if reply["done"]:
            self.end(episode)
        return EnvironmentReply(reply["messages"], reply["done"], reply["info"])


class SharedEnvironments:
    """Those of a run: each rank holds some, and all ranks know what all of them say."""

    def __init__(self, config: EnvironmentConfig, *, rank: int, world_size: int) -> None:
        """Start nothing yet."""
        self.mine, self._rank, self._world_size = Environments(config), rank, world_size
        self.is_first = rank == 0

    def answer(self, calls: Mapping[int, EnvironmentCall]) -> dict[int, EnvironmentReply]:
        """Ask the environments of some episodes at once; collective.

        Args:
            calls: by the number of the episode; the same on every rank.

        Raises:
            ConfigError: the class cannot be imported.
        """
        if self._world_size == 1:
            return self.mine.answer(calls)
        mine = {i: call for i, call in calls.items() if i % self._world_size == self._rank}
        shares = run_everywhere(lambda: self.mine.answer(mine))
        return {episode: reply for share in shares for episode, reply in share.items()}

    def end(self, episode: int) -> None:
        """End the environment of an episode; harmless where it is not."""
        self.mine.end(episode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End those of this rank."""
        self.mine.close()


def shared_environments(config: Config) -> SharedEnvironments | None:
    """Those of a run's ranks, or of a process alone; None: the run has none."""
    if config.talks_to is None:
        return None
    alone = not dist.is_initialized()
    return SharedEnvironments(
        config.talks_to,
        rank=0 if alone else dist.get_rank(),
        world_size=1 if alone else dist.get_world_size(),
    )
