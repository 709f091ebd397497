"""Episodes that go on each at its own pace, so that an engine is full until the last ones.

Each engine's rank plays its share: an environment is asked as soon as a turn is written, and the
next turn joins those that are being decoded. What was said is then told to all ranks. Which turns
are decoded together depends on time, and so do the last bits of their log-probs.
"""

import queue
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from megatron_tropd.data.samples import Sample, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.environments import EnvironmentReply, Environments
from megatron_tropd.rollout.episodes import Conversation

_POLL_SECONDS = 0.002
Event = EnvironmentReply | Sample
Transcripts = dict[int, list[Event]]
"""What happened in each episode, in its order."""


@dataclass
class _Share:
    """The episodes of one engine, while they are played."""

    engine: RolloutEngine
    environments: Environments
    episodes: Mapping[int, Conversation]
    told: Transcripts
    replies: "queue.SimpleQueue[tuple[int, EnvironmentReply | BaseException]]" = field(
        default_factory=queue.SimpleQueue
    )
    asked: int = 0
    """Environments that are being asked."""
    sampled: int = 0
    """Turns that are being sampled."""

    def go_on(self, number: int, threads: ThreadPoolExecutor) -> None:
        """Ask for whatever an episode wants next."""
        episode = self.episodes[number]
        if (call := episode.call()) is not None:
            self.asked += 1

            def answer() -> None:
                try:
                    self.replies.put((number, self.environments.answer_one(number, call)))
                except BaseException as error:  # raised where it is waited for
                    self.replies.put((number, error))

            threads.submit(answer)
        elif (request := episode.request()) is not None:
            self.sampled += 1
            self.engine.add_to_stream(number, request)
        else:
            self.environments.end(number)

    def next_event(self) -> tuple[int, Event] | None:
        """Wait a moment for a reply or a sample."""
        try:
            number, reply = self.replies.get(timeout=None if not self.sampled else 0)
        except queue.Empty:
            found = self.engine.next_of_stream(_POLL_SECONDS)
            if found is not None:
                self.sampled -= 1
            return found
        self.asked -= 1
        if isinstance(reply, BaseException):
            raise reply
        return number, reply


def play_share(
    engine: RolloutEngine,
    episodes: Mapping[int, Conversation],
    environments: Environments,
    sampling: Sampling,
    workers: int,
) -> Transcripts:
    """Go through episodes to their ends, with an engine and environments of this process."""
    share = _Share(engine, environments, episodes, {number: [] for number in episodes})
    environments.start()
    with engine.stream(sampling), ThreadPoolExecutor(workers) as threads:
        for number in episodes:
            share.go_on(number, threads)
        while share.asked or share.sampled:
            event = share.next_event()
            if event is None:
                continue
            number, said = event
            share.told[number].append(said)
            tell(episodes[number], said)
            share.go_on(number, threads)
    return share.told


def tell(episode: Conversation, event: Event) -> None:
    """Have an episode hear what happened in it."""
    if isinstance(event, Sample):
        episode.observe(event)
    else:
        episode.reply(event)


def replay(episode: Conversation, events: list[Event]) -> None:
    """Bring an episode to where another of the same start is."""
    for event in events:
        tell(episode, event)
        if episode.call() is None:
            episode.request()
