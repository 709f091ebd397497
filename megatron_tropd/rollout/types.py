"""What goes into the rollout engine and what comes out. No vllm here: any room may import it."""

from dataclasses import dataclass

from megatron_tropd.settings import Amount, Count, Number, Positive, Settings, Share


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


@dataclass(frozen=True)
class EngineSettings(Settings):
    """How one engine is built; what the parent hands to its child process."""

    model_folder: str
    """HF folder: config.json as we read it, safetensors of the first weights."""
    dtype: str
    """"float32" or "bfloat16"."""
    max_model_len: Count
    """Longest prompt + response in tokens."""
    memory: Positive
    """Share of each GPU's memory; without CUDA, GiB of KV cache."""
    tensor_parallel: Count
    """GPUs of the engine; 1 without CUDA."""
    max_num_seqs: Count | None
    """Most sequences decoded together; None: vLLM's default."""
    max_num_batched_tokens: Count | None
    """Most tokens of one forward pass; None: vLLM's default."""
    prefix_caching: bool
    """Share the KV cache of equal beginnings within one call."""
    cuda: bool
    """Whether the child runs on CUDA."""
    cut_from: str | None = None
    """HF folder of the first weights if the engine has the first columns of its vocabulary only;
    None: ``model_folder`` has them."""
    vocab_size: Count | None = None
    """Columns of the engine's vocabulary; None: the model's."""
