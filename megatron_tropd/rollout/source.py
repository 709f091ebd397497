"""Where the sequences of a step come from."""

import copy
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import read_patiently
from megatron_tropd.config import EnvironmentConfig
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.samples import EPISODE_FIELD, Sample, SampleRequest, Sampling
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences
from megatron_tropd.data.types import Prompt
from megatron_tropd.rollout.continuous import Transcripts, play_share, replay
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.environments import SharedEnvironments
from megatron_tropd.rollout.episodes import (
    Conversation,
    Episode,
    EpisodePlan,
    EpisodeStart,
    MakeEpisode,
)
from megatron_tropd.rollout.warmup import sampling_of_step

PENDING_FILE = "pending_rollouts.jsonl"
"""In a checkpoint: what was sampled for its next step, with older weights than it holds."""


class Generates(Protocol):
    """Whatever continues requests."""

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """One sample per request, in order."""


@runtime_checkable
class Wakes(Protocol):
    """Engines that give memory back after each call, unless they are kept awake."""

    def awake(self) -> AbstractContextManager[None]:
        """Keep the engines' memory until the block is left."""


def ask_environments(episodes: Sequence[Episode], environments: SharedEnvironments | None) -> None:
    """Have environments answer the episodes whose turn is over; collective if there are some."""
    talking = {i: e for i, e in enumerate(episodes) if isinstance(e, Conversation)}
    calls = {i: call for i, e in talking.items() if (call := e.call()) is not None}
    if not calls:
        return
    assert environments is not None, "settings without are refused"
    for i, reply in environments.answer(calls).items():
        talking[i].reply(reply)
        if talking[i].is_over():
            environments.end(i)


def play(
    episodes: Sequence[Episode],
    engine: Generates,
    sampling: Sampling,
    environments: SharedEnvironments | None,
) -> None:
    """Go through episodes to their ends, outside of a step; collective if the engine is."""
    awake = engine.awake() if isinstance(engine, Wakes) else nullcontext()
    with awake, environments or nullcontext():
        while True:
            ask_environments(episodes, environments)
            pairs = [(e, r) for e in episodes if (r := e.request()) is not None]
            if not pairs:
                return
            samples = engine.generate([request for _, request in pairs], sampling)
            for (episode, _), sample in zip(pairs, samples, strict=True):
                episode.observe(sample)


def check_environments(
    sequences: Sequence[TokenSequence], environment: EnvironmentConfig | None, *, say: bool
) -> None:
    """Stop if too many environments of some episodes failed; say what failed.

    Raises:
        InputError: more than ``environment.max_failures`` of them.
    """
    said = [said for sequence in sequences if (said := sequence.fields.get(EPISODE_FIELD))]
    errors = [f"{one['end']}: {one['error']}" for one in said if "error" in one]
    if not errors or environment is None:
        return
    found = f"{len(errors)} of {len(said)} environments failed, the first by {errors[0]}"
    if len(errors) > environment.max_failures * len(said):
        raise InputError(
            f"environment.name = {environment.name!r}: {found}. Correct it, or raise "
            f"environment.max_failures = {environment.max_failures:g}."
        )
    if say:
        print(f"tropd: warning: {found}; their episodes end there.", file=sys.stderr)


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


@dataclass(frozen=True)
class Mixture:
    """The tasks of a run, as far as sampling goes."""

    episodes: Sequence[tuple[MakeEpisode, EpisodePlan]]
    """How an episode of each task is made, by ``Prompt.task``."""
    choose: Callable[[int], Sequence[int]]
    """Places of a step's prompts among all."""


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
        mixture: Mixture | None = None,
        environments: SharedEnvironments | None = None,
        is_main: bool,
    ) -> None:
        """Ask for nothing yet.

        Args:
            engines: they sample with the weights they were given last.
            shared_stops: ids by which student and teacher end one, if they differ (``Blend``).
            mixture: of several tasks; None: all prompts are of one.
            environments: of episodes that talk to one.
        """
        self._engines = engines
        self._prompts = prompts
        self._settings = settings
        self._make_episode, self._mixture = make_episode, mixture
        self._stops, self._shared_stops = stop_token_ids, shared_stops
        self._sampling = Sampling()
        """Of the episodes under way."""
        self._environments = environments
        self._is_main = is_main
        self._step = -1
        """Of the episodes under way, or that are done."""
        self._version = 0
        """Of the weights that the episodes under way began with."""
        environment = settings.environment
        self._is_continuous = environment is not None and environment.continuous
        self._starts: list[EpisodeStart] = []
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
        rollout = self._settings.rollout
        self._sampling = sampling_of_step(
            rollout, step, stops=self._stops, shared_stops=self._shared_stops
        )
        self._starts = [
            self._start(self._prompts[place], sample, step)
            for place in self._chosen(step)
            for sample in range(rollout.samples_per_prompt)
        ]
        self._episodes = [self._make(start) for start in self._starts]
        if self._is_continuous:
            return  # an engine does one thing at a time: all of it when the samples are wanted
        self._ask_environments()
        self._engines.start(self._next_requests(), self._sampling)

    def _chosen(self, step: int) -> Sequence[int]:
        """Places of the step's prompts among all."""
        if self._mixture is not None:
            return self._mixture.choose(step)
        per_step, seed = self._settings.rollout.prompts_per_step, self._settings.seed
        return prompts_of_step(len(self._prompts), per_step, step, seed)

    def _start(self, prompt: Prompt, sample: int, step: int) -> EpisodeStart:
        settings = self._settings
        if self._mixture is not None:
            _, settings = self._mixture.episodes[prompt.task]
        return EpisodeStart(prompt, sample, step, self._version, settings)

    def _make(self, start: EpisodeStart) -> Episode:
        make = self._make_episode
        if self._mixture is not None:
            make, _ = self._mixture.episodes[start.prompt.task]
        return make(start)

    def collect(self) -> list[TokenSequence]:
        """Wait until all episodes are over."""
        self._wait()
        done, self._done = self._done, []
        return done

    def arrived(self, step: int) -> Sequence[TokenSequence] | None:
        """Those under way, once all have their samples; None of those that ask several times.

        Nor of those that talk to an environment.
        """
        with self._changing:
            if step != self._step or self._environments is not None:
                return None
            samples = self._engines.arrived() if self._episodes else None
            if samples is None:
                return list(self._done) or None
            # The episodes themselves learn of them when they are collected; settings are shared.
            plans = [self._settings]
            if self._mixture is not None:
                plans += [plan for _, plan in self._mixture.episodes]
            shared = {id(plan): plan for plan in plans}
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
        with self._changing:
            if self._is_continuous:
                self._play_at_own_pace()
            else:
                self._play_in_rounds()
            self._done = [episode.sequence() for episode in self._episodes]
            self._episodes = []
        check_environments(self._done, self._settings.environment, say=self._is_main)

    def _play_at_own_pace(self) -> None:
        engines, environment = self._engines, self._settings.environment
        assert isinstance(engines, EnginePool) and environment and self._environments
        owned = self._environments.mine

        def share(number: int, engine: RolloutEngine) -> Transcripts:
            mine = range(number, len(self._starts), len(engines.owners))
            played = {i: cast(Conversation, self._make(self._starts[i])) for i in mine}
            return play_share(engine, played, owned, self._sampling, environment.workers)

        for told in engines.on_engines(share):
            for number, events in told.items():
                replay(cast(Conversation, self._episodes[number]), events)

    def _play_in_rounds(self) -> None:
        with self._engines.awake():
            self._observe(self._engines.finish())
            self._ask_environments()
            while requests := self._next_requests():
                self._check_weights()
                self._observe(self._engines.generate(requests, self._sampling))
                self._ask_environments()

    def _ask_environments(self) -> None:
        ask_environments(self._episodes, self._environments)

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
