"""Episodes: what happens between a prompt and the sequence that is trained on.

A file here is a mode (``rollout.mode``); its ``EPISODE`` makes an episode of an
:class:`EpisodeStart`. Another package's is named as "package.module:attribute".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_tropd.base.parts import load_part
from megatron_tropd.config import EnvironmentConfig, GuidanceConfig, RolloutConfig
from megatron_tropd.data.conversations import Talk
from megatron_tropd.data.golden import GoldenAnswers
from megatron_tropd.data.prefixes import sample_seed
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import Sample, SampleRequest
from megatron_tropd.data.sequence import SampleKey, TokenSequence
from megatron_tropd.data.types import Prompt
from megatron_tropd.rollout.environments import EnvironmentCall, EnvironmentReply


@dataclass(frozen=True)
class EpisodePlan:
    """What all episodes of a run share."""

    rollout: RolloutConfig
    guidance: GuidanceConfig
    steps: int
    """``train.steps``."""
    seed: int
    """``train.seed``; keys every draw."""
    responses: Mapping[int, Sequence[TeacherResponse]] | None
    """The teacher's, by ``Prompt.index``; None: no guidance."""
    golden: GoldenAnswers | None = None
    """Of the prompts: the last sample of each is its golden answer. None: all are sampled."""
    environment: EnvironmentConfig | None = None
    """Whom the student talks to."""
    talk: Talk | None = None
    """How what is said becomes ids, if there is one."""


@dataclass(frozen=True)
class EpisodeStart:
    """What one episode begins with."""

    prompt: Prompt
    sample_index: int
    """0-based among the samples of the prompt in this step."""
    step: int
    """0-based training step."""
    weights_version: int
    """Optimizer steps that the sampling weights have seen."""
    settings: EpisodePlan

    @property
    def key(self) -> SampleKey:
        """Of the sequence."""
        return SampleKey(self.step, self.prompt.index, self.sample_index)

    @property
    def golden_answer(self) -> tuple[int, ...] | None:
        """What takes this sample's place; None: it is sampled."""
        golden, samples = self.settings.golden, self.settings.rollout.samples_per_prompt
        if golden is None or self.sample_index < samples - 1:
            return None
        return golden[self.prompt.index]

    def seed(self, turn: int = 0) -> int:
        """The seed of a request: that of no other sample, step or turn."""
        return sample_seed(
            self.settings.seed, self.step, self.prompt.index, self.sample_index, turn
        )


class Episode(Protocol):
    """One sample on its way. It runs on every rank, so it must do the same on all of them."""

    def request(self) -> SampleRequest | None:
        """What to sample next; None: the episode is over. Asked once for each turn."""

    def observe(self, sample: Sample) -> None:
        """Take the answer to the last request."""

    def sequence(self) -> TokenSequence:
        """What is trained on, once the episode is over."""


@runtime_checkable
class Conversation(Episode, Protocol):
    """An episode with an environment, which is asked for all ranks on one of them."""

    def call(self) -> EnvironmentCall | None:
        """What to ask the environment next; None: nothing."""

    def reply(self, reply: EnvironmentReply) -> None:
        """Take its answer to the last call."""

    def is_over(self) -> bool:
        """Whether the environment is not needed any more."""


MakeEpisode = Callable[[EpisodeStart], Episode]


def load_mode(name: str) -> MakeEpisode:
    """The mode that ``rollout.mode`` names.

    Raises:
        ConfigError: there is none of this name.
    """
    make: MakeEpisode = load_part(__name__, name, attribute="EPISODE", setting="rollout.mode")
    return make
