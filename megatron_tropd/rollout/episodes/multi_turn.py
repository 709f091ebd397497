"""Several turns: the student writes, its environment answers, until one of them has done.

What the environment and the chat template write is CONTEXT between the student's turns; it carries
no loss. An environment that fails ends its episode, and what the student wrote is trained on.
"""

from typing import Any

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config.settings import is_number
from megatron_tropd.data.golden import golden_sequence
from megatron_tropd.data.prefixes import plan_sample
from megatron_tropd.data.samples import EPISODE_FIELD, Sample, SampleRequest
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.data.templates import Message, conversation
from megatron_tropd.rollout.environments import EnvironmentCall, EnvironmentReply
from megatron_tropd.rollout.episodes import EpisodeStart

_Run = tuple[Writer, tuple[int, ...]]
_CUT = ("length", "turns")
"""Ends by a limit of ours."""


class MultiTurn:
    """One episode with an environment."""

    def __init__(self, start: EpisodeStart) -> None:
        """Ask the environment for the first messages, unless a golden answer takes the place."""
        plan = start.settings
        assert plan.environment is not None and plan.talk is not None, (
            "settings without are refused"
        )
        self._start, self._config, self._talk = start, plan.environment, plan.talk
        self._prompt, self._golden = start.prompt, start.golden_answer
        self._most = len(start.prompt.token_ids) + plan.rollout.new_tokens_at(start.step)
        self._messages: list[Message] = []
        self._runs: list[tuple[Writer, tuple[int, ...]]] = [
            (Writer.CONTEXT, self._prompt.token_ids)
        ]
        self._turns: list[Sample] = []
        self._call: EnvironmentCall | None = None
        self._request: SampleRequest | None = None
        self._end = self._error = ""
        self._info: dict[str, Any] = {}
        self._drifted = 0
        if self._golden is None:
            self._call = EnvironmentCall(prompt=self._prompt.fields)

    def call(self) -> EnvironmentCall | None:
        """What to ask the environment next; None: nothing."""
        return self._call

    def reply(self, reply: EnvironmentReply) -> None:
        """Take its answer to the last call."""
        self._call = None
        if reply.failure:
            self._fail(reply.failure, reply.error)
            return
        self._info |= reply.info
        try:
            self._go_on(reply) if self._turns else self._begin(reply)
        except InputError as error:
            self._fail("refused", str(error))

    def request(self) -> SampleRequest | None:
        """Continue all that was written so far, with the room of one turn."""
        request, self._request = self._request, None
        return request

    def observe(self, sample: Sample) -> None:
        """Take the student's turn; the environment is to hear it."""
        self._turns.append(sample)
        self._runs.append((Writer.STUDENT, sample.token_ids))
        stopped = sample.finish_reason == "stop"
        text = self._talk.text_of(self._turn(), stopped=stopped)
        self._drifted += not self._talk.same_again(self._turn(), text, stopped=stopped)
        self._messages.append({"role": "assistant", "content": text})
        self._call = EnvironmentCall(text=text)

    def is_over(self) -> bool:
        """Whether the environment is not needed any more."""
        return bool(self._end)

    def sequence(self) -> TokenSequence:
        """All turns, and what stood between them."""
        start, turns = self._start, self._turns
        if self._golden is not None:
            return golden_sequence(start.key, start.prompt, self._golden)
        cut = self._end in _CUT or (bool(turns) and turns[-1].finish_reason == "length")
        return TokenSequence.of_runs(
            start.key,
            *self._runs,
            logprobs=[logprob for turn in turns for logprob in turn.logprobs],
            version=start.weights_version,
            finish="length" if cut else "stop",
            fields={EPISODE_FIELD: self._said()},
        )

    def last_turn(self) -> Sample:
        """The student's last; an empty one if it had none."""
        return self._turns[-1] if self._turns else Sample((), (), "stop")

    def _said(self) -> dict[str, Any]:
        numbers = {name: value for name, value in self._info.items() if is_number(value)}
        said = {"turns": len(self._turns), "end": self._end, "drifted": self._drifted}
        return {**said, "info": numbers, **({"error": self._error} if self._error else {})}

    def _turn(self) -> tuple[int, ...]:
        """Ids of the turn that was sampled last, a teacher's prefix included."""
        turn = self._turns[-1].token_ids
        if len(self._turns) == 1 and self._runs[-2][0] == Writer.TEACHER:
            return self._runs[-2][1] + turn
        return turn

    def _begin(self, reply: EnvironmentReply) -> None:
        """Ask for the first turn, after a prefix if this sample carries one."""
        start, plan = self._start, self._start.settings
        opened, self._messages = self._talk.opening(self._prompt, reply.messages)
        if plan.responses is not None and opened.token_ids != self._prompt.token_ids:
            raise ConfigError(
                f"guidance.responses answer the prompts as their file has them, but reset() of "
                f"environment.name = {self._config.name!r} made another one of "
                f"{self._prompt.place}. Have reset() return None, or leave out guidance.responses."
            )
        self._prompt = opened
        self._runs = [(Writer.CONTEXT, opened.token_ids)]
        room = self._room()
        if room < 1:
            self._end = "length"
            return
        planned = plan_sample(
            opened,
            start.sample_index,
            plan.responses,
            step=start.step,
            steps=plan.steps,
            max_new_tokens=room,
            guidance=plan.guidance,
            seed=plan.seed,
        )
        self._runs.append((Writer.TEACHER, planned.prefix_ids))
        self._request = planned.request

    def _go_on(self, reply: EnvironmentReply) -> None:
        """Ask for another turn, after what the environment said."""
        last = self._turns[-1]
        if reply.done:
            self._end = "done"
        elif last.finish_reason == "length":
            self._end = "length"
        elif len(self._turns) == self._config.turns:
            self._end = "turns"
        else:
            self._say(last, _spoken(reply.messages, f"the episode of {self._prompt.place}"))

    def _say(self, last: Sample, messages: list[Message]) -> None:
        ids = self._talk.after(self._prompt, self._messages[:-1], messages)
        stop = last.token_ids[-1]
        if ids and stop == ids[0]:
            ids = ids[1:]  # the student wrote it
        elif stop not in self._config.stop_token_ids:
            self._end = "stop"  # of the whole response, not of a turn
            return
        self._messages += messages
        self._runs.append((Writer.CONTEXT, ids))
        if (room := self._room()) < 1:
            self._runs.pop()
            self._end = "length"
            return
        context = tuple(token for _, run in self._runs for token in run)
        self._request = SampleRequest(context, room, self._start.seed(len(self._turns)))

    def _room(self) -> int:
        """Tokens of the next turn."""
        left = self._most - sum(len(ids) for _, ids in self._runs)
        return min(left, self._config.turn_tokens or left)

    def _fail(self, kind: str, error: str) -> None:
        self._end, self._error = kind, error


def _spoken(messages: Any, where: str) -> list[Message]:
    """Check what an environment says between two turns."""
    found = conversation(messages, where)
    if roles := [m["role"] for m in found if m["role"] == "assistant"]:
        raise InputError(f"{where}: an environment does not speak as {roles[0]!r}.")
    return found


EPISODE = MultiTurn
