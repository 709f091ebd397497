"""Off-policy guidance: which samples start with a teacher prefix, and how long it is.

Source: TrOPD, arXiv 2606.01249: trajectories are teacher prefix ++ student continuation, the
longest prefix falls from the whole response to nothing by a half cosine over the training. A
constant schedule is GKD's share of the teacher's own sequences, arXiv 2306.13649.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import BLEND, Sample, SampleRequest, blend_sums
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.types import Prompt
from megatron_tropd.losses.draws import Purpose, keyed_seed


@dataclass(frozen=True)
class PlannedSample:
    """One sequence to be: what the engine is asked, and where it comes from."""

    prompt: Prompt
    sample_index: int
    """0-based among the samples of the prompt in this step."""
    prefix_ids: tuple[int, ...]
    """[F] teacher tokens after the prompt; empty for a fully on-policy sample."""
    request: SampleRequest
    """Prompt and prefix to continue, with the room left and the seed of this sample."""

    def sequence(self, sample: Sample, *, step: int, version: int) -> TokenSequence:
        """Join what was asked with what the engine wrote.

        Args:
            version: optimizer steps that the sampling weights had seen.
        """
        blend = sample.blend
        return TokenSequence.of_runs(
            SampleKey(step, self.prompt.index, self.sample_index),
            (Writer.CONTEXT, self.prompt.token_ids),
            (Writer.TEACHER, self.prefix_ids),
            (Writer.STUDENT, sample.token_ids),
            logprobs=sample.logprobs,
            behaviour_logprobs=blend and blend.logprobs,
            version=version,
            finish=sample.finish_reason,
            fields={} if blend is None else {BLEND: blend_sums(blend)},
        )


def alpha(step: int, steps: int, schedule: Literal["cosine", "constant"] = "cosine") -> float:
    """Half cosine (1 + cos(pi t / T)) / 2: 1 at step 0, 0 at step T; or always 1.

    Args:
        step: t, 0-based.
        steps: T, ``train.steps``.
        schedule: ``guidance.schedule``; constant is always 1.

    Returns:
        Longest allowed prefix as a share of the response, 0..1.
    """
    if schedule == "constant":
        return 1.0
    return (1.0 + math.cos(math.pi * step / steps)) / 2.0


def prefix_length(
    response: TeacherResponse,
    *,
    step: int,
    steps: int,
    max_new_tokens: int,
    rule: Literal["longest", "uniform"] = "longest",
    schedule: Literal["cosine", "constant"] = "cosine",
    draw: float = 0.0,
) -> int:
    """Tokens of a teacher response that a trajectory starts with.

    longest: floor(alpha(t) R); uniform: floor(draw x (that + 1)). R counts the response's tokens.
    The closing stop token is never part of a prefix and at least one token is left to write.

    Args:
        max_new_tokens: longest prefix and continuation together.
        draw: number in [0, 1), used by "uniform".

    Returns:
        Number of tokens, 0 or more.
    """
    length = len(response.token_ids)
    usable = length - 1 if response.finish_reason == "stop" else length
    longest = min(math.floor(alpha(step, steps, schedule) * length), usable, max_new_tokens - 1)
    return math.floor(draw * (longest + 1)) if rule == "uniform" else longest


def plan_requests(
    prompts: Sequence[Prompt],
    responses: Mapping[int, Sequence[TeacherResponse]] | None,
    *,
    rollout: RolloutConfig,
    **settings: Any,
) -> list[PlannedSample]:
    """Every sample of one step, those of a prompt beside each other."""
    most = rollout.new_tokens_at(settings["step"])
    return [
        plan_sample(prompt, sample, responses, max_new_tokens=most, **settings)
        for prompt in prompts
        for sample in range(rollout.samples_per_prompt)
    ]


def plan_sample(
    prompt: Prompt,
    sample_index: int,
    responses: Mapping[int, Sequence[TeacherResponse]] | None,
    *,
    step: int,
    steps: int,
    max_new_tokens: int,
    guidance: GuidanceConfig,
    seed: int,
) -> PlannedSample:
    """One sample of a step; the first ones of each prompt start with a teacher prefix.

    Args:
        sample_index: 0-based among the samples of the prompt in this step.
        responses: teacher responses by ``Prompt.index``; None switches guidance off.
        max_new_tokens: longest prefix and continuation together.
    """
    prefix: tuple[int, ...] = ()
    if responses is not None and sample_index < guidance.prefixed_per_prompt:
        key = (seed, Purpose.PREFIX, step, prompt.index, sample_index)
        options = responses[prompt.index]
        response = options[keyed_seed(*key, 0) % len(options)]
        length = prefix_length(
            response,
            step=step,
            steps=steps,
            max_new_tokens=max_new_tokens,
            rule=guidance.prefix_length,
            schedule=guidance.schedule,
            draw=keyed_seed(*key, 1) / 2**63,
        )
        prefix = response.token_ids[:length]
    request = SampleRequest(
        token_ids=prompt.token_ids + prefix,
        max_new_tokens=max_new_tokens - len(prefix),
        seed=sample_seed(seed, step, prompt.index, sample_index),
    )
    return PlannedSample(prompt, sample_index, prefix, request)


def sample_seed(seed: int, step: int, prompt_index: int, sample_index: int, turn: int = 0) -> int:
    """The seed of one request: ``turn`` counts those before it of the same sample."""
    turns = (turn,) if turn else ()
    return keyed_seed(seed, Purpose.ROLLOUT, step, prompt_index, sample_index, *turns)
