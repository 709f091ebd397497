"""Where the sequences of a step come from."""

import copy
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.files import read_patiently
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences
from megatron_tropd.data.types import Prompt
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.episodes import Episode, EpisodePlan, EpisodeStart, MakeEpisode
from megatron_tropd.rollout.warmup import sampling_of_step

PENDING_FILE = "pending_rollouts.jsonl"
"""In a checkpoint: what was sampled for its next step, with older weights than it holds."""


class RolloutSource(Protocol):
    """The sequences of one step at a time; every method is collective."""

    def begin(self, step: int) -> None:
        """Ask for the sequences of a step; harmless if some are asked for already."""

    def collect(self) -> list[TokenSequence]:
        """Wait for the sequences asked for last; the same on every rank."""

    def arrived(self, step: int) -> Sequence[TokenSequence] | None:
        """A later step's sequences, if they are known before they are collected.

        Not collective: on the first rank, in any thread.
        """

    def forget(self) -> None:
        """Give up what was asked for."""

    def state(self) -> dict[str, bytes]:
        """Files by name for a checkpoint, so that a resumed run trains on the same sequences.

        Waits for what was asked for, which stays to be collected. Empty but on the rank that
        writes.
        """

    def restore(self, checkpoint: Path) -> None:
        """Take up the :meth:`state` that ``checkpoint`` holds."""


class SampledRollouts:
    """The source that samples: all episodes of a step, side by side, by the engines."""

    def __init__(
        self,
        engines: SamplingEngines,
        make_episode: MakeEpisode,
        prompts: Sequence[Prompt],
        settings: EpisodePlan,
        *,
        stop_token_ids: Sequence[int],
        shared_stops: Sequence[int] = (),
        is_main: bool,
    ) -> None:
        """Ask for nothing yet.

        Args:
            engines: they sample with the weights they were given last.
            shared_stops: ids by which student and teacher end one, if they differ (``Blend``).
        """
        self._engines = engines
        self._make_episode = make_episode
        self._prompts = prompts
        self._settings = settings
        self._stops, self._shared_stops = stop_token_ids, shared_stops
        self._sampling = Sampling()
        """Of the episodes under way."""
        self._is_main = is_main
        self._step = -1
        """Of the episodes under way, or that are done."""
        self._version = 0
        """Of the weights that the episodes under way began with."""
        self._episodes: list[Episode] = []
        """Under way."""
        self._asked: list[Episode] = []
        """Those of them that wait for an answer."""
        self._done: list[TokenSequence] = []
        self._changing = threading.Lock()
        """Held while episodes begin and learn of samples: others look at them (``arrived``)."""

    def begin(self, step: int) -> None:
        """Ask for the first samples of all episodes of a step, with the engines' weights."""
        if self._episodes or self._done:
            return
        with self._changing:
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._version, self._step = self._engines.channel.version, step
        rollout, seed = self._settings.rollout, self._settings.seed
        self._sampling = sampling_of_step(
            rollout, step, stops=self._stops, shared_stops=self._shared_stops
        )
        self._episodes = [
            self._make_episode(
                EpisodeStart(self._prompts[index], sample, step, self._version, self._settings)
            )
            for index in prompts_of_step(len(self._prompts), rollout.prompts_per_step, step, seed)
            for sample in range(rollout.samples_per_prompt)
        ]
        self._engines.start(self._next_requests(), self._sampling)

    def collect(self) -> list[TokenSequence]:
        """Wait until all episodes are over."""
        self._wait()
        done, self._done = self._done, []
        return done

    def arrived(self, step: int) -> Sequence[TokenSequence] | None:
        """Those under way, once all have their samples; None of those that ask several times."""
        with self._changing:
            if step != self._step:
                return None
            samples = self._engines.arrived() if self._episodes else None
            if samples is None:
                return list(self._done) or None
            # The episodes themselves learn of them when they are collected; settings are shared.
            shared = {id(self._settings): self._settings}
            ended, asked = copy.deepcopy((self._episodes, self._asked), shared)
        for episode, sample in zip(asked, samples, strict=True):
            episode.observe(sample)
        if any(episode.request() is not None for episode in ended):
            return None
        return [episode.sequence() for episode in ended]

    def forget(self) -> None:
        """Give up the episodes under way."""
        self._episodes = []

    def state(self) -> dict[str, bytes]:
        """The finished sequences that nobody has collected."""
        self._wait()
        if not (self._is_main and self._done):
            return {}
        return {PENDING_FILE: dump_sequences(self._done)}

    def restore(self, checkpoint: Path) -> None:
        """Take up what was pending when ``checkpoint`` was written."""
        path = checkpoint / PENDING_FILE
        if path.exists():
            self._done = read_patiently(lambda: read_sequences(path))
            self._step = self._done[0].key.step

    def _wait(self) -> None:
        if not self._episodes:
            return
        with self._changing, self._engines.awake():
            self._observe(self._engines.finish())
            while requests := self._next_requests():
                self._check_weights()
                self._observe(self._engines.generate(requests, self._sampling))
            self._done = [episode.sequence() for episode in self._episodes]
            self._episodes = []

    def _next_requests(self) -> list[SampleRequest]:
        pairs = [(episode, episode.request()) for episode in self._episodes]
        self._asked = [episode for episode, request in pairs if request is not None]
        return [request for _, request in pairs if request is not None]

    def _observe(self, samples: Sequence[Sample]) -> None:
        for episode, sample in zip(self._asked, samples, strict=True):
            episode.observe(sample)

    def _check_weights(self) -> None:
        now, mode = self._engines.channel.version, self._settings.rollout.mode
        if now != self._version:
            raise ConfigError(
                f'rollout.mode = "{mode}" asks several times, but the weights went from step '
                f"{self._version} to {now} in between. Set rollout.steps_ahead = 0."
            )
