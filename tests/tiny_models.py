"""Small models with random weights as HF folders, and a byte-level tokenizer to go with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
OWN_SETTINGS = {
    "mistral": {"sliding_window": 10},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
}
"""Of a family, beside those that all share."""
VOCAB_SIZE = 259
"""256 bytes after <unk>, <s> and </s>: no tensor-parallel size above 1 divides it."""
BOS, EOS = 1, 2


def write_tiny_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer (:data:`VOCAB_SIZE` ids, BOS 1, EOS 2) into ``folder``."""
    vocab = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A padding token of its own keeps Qwen's tokenizer class from adding one to the vocabulary.
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of ``family`` (2 layers, 4 heads on 2 KV heads of 32) with a tokenizer.

    Args:
        folder: made if absent.
        family: a key of :data:`FAMILIES`.
        seed: of the weights; norms and biases are made random too, so that a mistake shows.
        overrides: fields of the transformers config.

    Returns:
        ``folder``.
    """
    config_class, model_class = FAMILIES[family]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
        **OWN_SETTINGS.get(family, {}),
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**(settings | overrides)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder
