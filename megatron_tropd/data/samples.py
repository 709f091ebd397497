"""What is asked of a rollout engine and what it answers."""

from dataclasses import dataclass

from megatron_tropd.config.settings import Amount, Number, Settings, Share


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
class Sampling(Settings):
    """How to sample; shared by all requests of a call."""

    temperature: Amount = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Nucleus; 1 is off."""
    stop_token_ids: tuple[Number, ...] = ()
    """Ids that end a sample, EOS included: the engine adds nothing by itself."""


@dataclass(frozen=True)
class Sample:
    """One continuation, in the order of the requests."""

    token_ids: tuple[int, ...]
    """[R] new ids, the stop token included when ``finish_reason`` is "stop"."""
    logprobs: tuple[float, ...]
    """[R] log q of each at temperature 1 over the whole vocabulary (before top-p), in nats."""
    finish_reason: str
    """"stop" or "length"."""
