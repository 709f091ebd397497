"""A rollout mode of your own: ``rollout.mode = "own_rollout:TwoTurns"``."""

from megatron_tropd.data.samples import Sample, SampleRequest
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.rollout.episodes import EpisodeStart

TOOL = (7, 8)
"""What the "tool" says."""


class TwoTurns:
    """A tool answers the student's first turn, unless it is empty or odd; then the second comes."""

    def __init__(self, start: EpisodeStart) -> None:
        self.start = start
        self.context = start.prompt.token_ids
        self.turns: list[Sample] = []

    def request(self) -> SampleRequest | None:
        if len(self.turns) == 2 or (self.turns and self.turns[0].token_ids[0] % 2):
            return None
        # Both turns and the tool's answer fit what the engine is built for.
        room = (self.start.settings.rollout.max_new_tokens - len(TOOL)) // 2
        return SampleRequest(self.context, room, self.start.seed(len(self.turns)))

    def observe(self, sample: Sample) -> None:
        self.turns.append(sample)
        if self.request() is not None:
            self.context += sample.token_ids + TOOL

    def sequence(self) -> TokenSequence:
        runs = [(Writer.CONTEXT, self.start.prompt.token_ids)]
        for turn in self.turns:
            runs += [(Writer.STUDENT, turn.token_ids), (Writer.CONTEXT, TOOL)]
        return TokenSequence.of_runs(
            self.start.key,
            *runs[:-1],
            logprobs=[logprob for turn in self.turns for logprob in turn.logprobs],
            version=self.start.weights_version,
            finish=self.turns[-1].finish_reason,
        )
