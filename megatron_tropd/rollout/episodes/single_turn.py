"""One request for each sample: the prompt, perhaps a teacher prefix, and the student's response.

A golden answer asks for nothing.
"""

from megatron_tropd.data.golden import golden_sequence
from megatron_tropd.data.prefixes import plan_sample
from megatron_tropd.data.samples import Sample, SampleRequest
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.rollout.episodes import EpisodeStart


class SingleTurn:
    """Asks once."""

    def __init__(self, start: EpisodeStart) -> None:
        """Choose the prefix, if this sample carries one."""
        settings = start.settings
        self._start = start
        self._golden = start.golden_answer
        self._sample: Sample | None = None
        self._plan = plan_sample(
            start.prompt,
            start.sample_index,
            settings.responses,
            step=start.step,
            steps=settings.steps,
            max_new_tokens=settings.rollout.new_tokens_at(start.step),
            guidance=settings.guidance,
            seed=settings.seed,
        )

    def request(self) -> SampleRequest | None:
        """Continue prompt and prefix with the room that is left."""
        over = self._golden is not None or self._sample is not None
        return None if over else self._plan.request

    def observe(self, sample: Sample) -> None:
        """Keep the response."""
        self._sample = sample

    def sequence(self) -> TokenSequence:
        """Prompt, prefix and response, or prompt and golden answer."""
        start, sample = self._start, self._sample
        if self._golden is not None:
            return golden_sequence(start.key, start.prompt, self._golden)
        assert sample is not None, "sequence before observe"
        return self._plan.sequence(sample, step=start.step, version=start.weights_version)


EPISODE = SingleTurn
