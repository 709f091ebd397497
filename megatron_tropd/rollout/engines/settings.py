"""How an engine is built."""

from dataclasses import dataclass

from megatron_tropd.config.settings import Between, Count, Positive, Settings


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """How one engine is built; what the parent hands to its child process."""

    model_folder: str
    """HF folder: config.json as we read it, safetensors of the first weights."""
    dtype: str = "float32"
    """"float32" or "bfloat16"."""
    max_model_len: Count
    """Longest prompt + response in tokens."""
    gpu_share: Between = 0.85
    """Of each GPU's memory."""
    cpu_kv_gib: Positive = 1.0
    """GiB of KV cache without CUDA."""
    tensor_parallel: Count = 1
    """GPUs of the engine; 1 without CUDA."""
    max_num_seqs: Count | None = None
    """Most sequences decoded together; None: vLLM's default."""
    prefix_caching: bool = True
    """Share the KV cache of equal beginnings within one call."""
    cuda: bool
    """Whether the child runs on CUDA."""
    max_num_batched_tokens: Count | None = None
    """Most tokens of one forward pass; None: vLLM's default."""
    cut_from: str | None = None
    """HF folder of the first weights if the engine has the first columns of its vocabulary only;
    None: ``model_folder`` has them."""
    vocab_size: Count | None = None
    """Columns of the engine's vocabulary; None: the model's."""
    draft_folder: str | None = None
    """HF folder of a student that drafts for ``model_folder``, the teacher; None: one model."""
    draft_tokens: Count | None = None
    """Drafts for each pass of the teacher."""
    draft_cut_from: str | None = None
    """As ``cut_from``, of the student."""
