"""What is asked of a rollout engine and what it answers."""

from dataclasses import dataclass
from typing import Literal

from megatron_tropd.config.settings import Amount, Count, Number, Settings, Share


@dataclass(frozen=True)
class SampleRequest:
    """One sequence to continue."""

    token_ids: tuple[int, ...]
    """[L] prompt ids followed by the teacher prefix, if any."""
    max_new_tokens: int
    """Most tokens to add, at least 1."""
    seed: int
    """Seed of this request alone, 0 <= seed < 2**63."""


@dataclass(frozen=True)
class Blend(Settings):
    """A distribution between student and teacher (``rollout.behaviour``)."""

    kind: Literal["blended", "mixture", "skd"]
    """As ``rollout.behaviour`` has them."""
    strength: Amount = 0.0
    """Of this step: epsilon in nats, or the teacher's share of the mixture."""
    top_k: Count = 1
    """Of the teacher (skd)."""
    stops: tuple[Number, ...] = ()
    """Ids by which the two models stop, if they differ: one event, written as the first."""


@dataclass(frozen=True)
class Sampling(Settings):
    """How to sample; shared by all requests of a call."""

    temperature: Amount = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Nucleus; 1 is off."""
    stop_token_ids: tuple[Number, ...] = ()
    """Ids that end a sample, EOS included: the engine adds nothing by itself."""
    blend: Blend | None = None
    """Sample from between student and teacher; None: from the engine's one model."""


@dataclass(frozen=True)
class BlendTrace:
    """What it took to sample a continuation from between student and teacher."""

    logprobs: tuple[float, ...]
    """[R] log mu of each token, in nats: what it was sampled from."""
    kl: tuple[float, ...]
    """[R] KL(mu || q) before each token, in nats."""
    b: tuple[float, ...]
    """[R] share of the teacher in mu (``Blended.b_N``)."""
    passes: tuple[int, ...]
    """[R] number of the teacher's pass that settled the token; the first is 1."""


BLEND = "blend"
"""In the fields of a sequence that was sampled from between two models: :func:`blend_sums`."""


EPISODE_FIELD = "episode"
"""In the fields of a sequence of several turns: how many, its end, what its environment said."""


def blend_sums(trace: BlendTrace) -> dict[str, float]:
    """What the metrics of a step need of a response."""
    passes = trace.passes[-1] if trace.passes else 0
    return {"tokens": len(trace.b), "passes": passes, "kl": sum(trace.kl), "b": sum(trace.b)}


@dataclass(frozen=True)
class Sample:
    """One continuation, in the order of the requests."""

    token_ids: tuple[int, ...]
    """[R] new ids, the stop token included when ``finish_reason`` is "stop"."""
    logprobs: tuple[float, ...]
    """[R] log q of each at temperature 1 over the whole vocabulary (before top-p), in nats."""
    finish_reason: str
    """"stop" or "length"."""
    blend: BlendTrace | None = None
    """None: the student alone sampled it."""
