"""The keys of config.json: which are carried, which mean nothing here, and which are refused.

Two programs read a config.json: transformers, whose model is the one that is trained and exported,
and vLLM, which samples. Each reads keys that the other ignores, and then they compute two models.
So a key is known and carried, or known and without effect on logits, or refused by its name. The
engine gets a config.json of its own, written from what was carried (:func:`written_config`).
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.families._base import (
    COMMON_REQUIREMENTS,
    Family,
    ModelShape,
    Requirement,
)

CARRIED = frozenset(
    [
        *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_theta"),
        *("rope_scaling", "rope_parameters", "sliding_window", "layer_types"),
        *("use_sliding_window", "max_window_layers"),
    ]
)
"""What every family reads, windows of attention included; a family adds its own."""

HARMLESS = frozenset(
    [
        # of the file and of how it was made
        *("transformers_weights", "transformers_version", "torch_dtype", "dtype", "auto_map"),
        *("tokenizer_class", "name", "name_or_path", "is_llama_config"),
        *("model_name", "license", "license_name", "language", "base_model", "prefix"),
        *("base_model_name_or_path", "unsloth_version", "unsloth_fixed", "unsloth_training"),
        *("transformers.js_config", "num_params", "num_parameters", "initializer_range"),
        # token ids: read by whoever tokenises and generates, from here or elsewhere
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("cls_token_id", "mask_token_id", "decoder_start_token_id"),
        # training with transformers
        *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout"),
        *("embd_pdrop", "attn_pdrop", "classifier_dropout", "gradient_checkpointing", "loss_type"),
        *("router_aux_loss_coef", "output_router_logits", "task_specific_params"),
        *("finetuning_task", "problem_type", "id2label", "label2id", "num_labels"),
        # the same numbers another way, or more of them
        *("use_cache", "pretraining_tp", "chunk_size_feed_forward", "attn_implementation"),
        *("output_hidden_states", "output_attentions", "output_scores", "return_dict"),
        *("return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "is_decoder"),
        *("tie_encoder_decoder", "use_flash_attn", "use_flash_attention_2"),
        # lengths somebody was trained or served with
        *("model_max_length", "max_sequence_length", "max_seq_len", "seq_length", "seq_len"),
        # generation; transformers moves them to generation_config.json
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    ]
)
"""Without effect on logits, whatever they hold."""

_REMOVE = "Remove it from config.json if the weights were trained without it, or choose another."

NEUTRAL = (
    Requirement("is_causal", (True,), "Only causal models are distilled."),
    Requirement("is_encoder_decoder", (False,)),
    Requirement("add_cross_attention", (False,)),
    Requirement("bias", (False,), _REMOVE),
    Requirement("logit_scale", (1,), _REMOVE),
    Requirement("logits_scaling", (1,), _REMOVE),
    Requirement("embedding_multiplier", (1,), _REMOVE),
    Requirement("residual_multiplier", (1,), _REMOVE),
    Requirement("head_dtype", ("model",), _REMOVE),
    Requirement("alibi", (False,), _REMOVE),
    Requirement("rope_interleaved", (False,), _REMOVE),
    Requirement("activation", ("swiglu", "silu"), _REMOVE),
    Requirement("num_nextn_predict_layers", (0,), _REMOVE),
)
"""Keys that some reader of a folder knows beside transformers, with the values that change
nothing."""


_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "num_key_value_heads", "head_dim"),
)


def requirements_of(family: Family) -> tuple[Requirement, ...]:
    """Everything that is asked of fields of a family's config."""
    own = [
        Requirement("qkv_bias", (family.qkv_bias,)),
        Requirement("qk_norm", (family.qk_norm,)),
        Requirement("use_qk_norm", (family.qk_norm,)),
    ]
    every = (*COMMON_REQUIREMENTS, *NEUTRAL, *own, *family.requirements)
    return tuple(each for each in every if each.field not in family.ignores)


_ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
"""By rope_type: the numbers of the scaling."""
_ROPE_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def known_keys(family: Family) -> frozenset[str]:
    """Every key that config.json of a family may have with a value."""
    required = {requirement.field.split(".")[0] for requirement in requirements_of(family)}
    return CARRIED | HARMLESS | family.expert_keys | family.keys | required | set(family.ignores)


def new_fields(family: Family) -> set[str]:
    """Fields that the installed transformers reads for a family and nobody here has looked at."""
    names = {field.name for field in fields(CONFIG_MAPPING[family.model_type])}
    return {name for name in names - known_keys(family) if not name.startswith("_")}


def check_keys(hf_config: Mapping[str, Any], family: Family) -> None:
    """Refuse keys of a config.json of which nobody here knows what they do.

    Raises:
        InputError: names them with their values.
    """
    known = known_keys(family)
    unknown = {
        key: value
        for key, value in hf_config.items()
        if key not in known and not key.startswith("_") and not _says_nothing(key, value)
    }
    if unknown:
        listed = ", ".join(f"{key} = {value!r}"[:200] for key, value in sorted(unknown.items()))
        raise InputError(
            f"config.json of this {family.model_type} model has {listed}, which transformers does "
            f"not read for a {family.model_type}: who reads it may compute another model. "
            f"{_REMOVE}"
        )


def check_numbers(hf_config: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Refuse values that no model has.

    Raises:
        InputError: names key and value.
    """
    for field in _SIZES:
        value = hf_config.get(field)
        value = getattr(config, field, None) if value is None else value
        if value is not None and value < 1:
            raise InputError(f"config.json must have {field} of at least 1, found {value}.")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if groups and heads % groups:
        raise InputError(
            f"config.json has {heads} attention heads for {groups} key/value heads, expected a "
            "multiple."
        )
    eps = config.rms_norm_eps
    if not 0 < eps < 1:
        raise InputError(f"config.json must have rms_norm_eps between 0 and 1, found {eps!r}.")
    counts = {
        repr(hf_config[name])
        for name in ("num_experts", "num_local_experts")
        if hf_config.get(name) is not None
    }
    if len(counts) > 1:
        raise InputError(
            f"config.json has num_experts = {hf_config['num_experts']} and num_local_experts = "
            f"{hf_config['num_local_experts']}, two names of one number. Remove the wrong one."
        )
    _check_rope(hf_config, config.rope_parameters)


def check_windows(hf_config: Mapping[str, Any], family: Family, shape: ModelShape) -> None:
    """Refuse windows of attention that one reader of config.json applies and another does not.

    Raises:
        InputError: says what contradicts what.
    """
    window, switch = hf_config.get("sliding_window"), hf_config.get("use_sliding_window")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise InputError(f"config.json must have a whole sliding_window or null, found {window!r}.")
    if window is None or window >= shape.context or (switch is False and not shape.has_window):
        return
    if window < 1:
        raise InputError(
            f"config.json must have sliding_window of at least 1 or null, found {window}."
        )
    which = f"This {family.model_type} model has sliding_window = {window}"
    if not family.has_windows:
        raise InputError(
            f"{which}, but transformers' {family.architecture} attends to everything: vLLM would "
            "apply the window. Set it to null in config.json if the model was trained without."
        )
    if switch is False:
        raise InputError(
            f"{which} and use_sliding_window = false, which {family.architecture} does not read. "
            "Set sliding_window to null, or remove use_sliding_window."
        )
    layers = hf_config.get("max_window_layers")
    if not family.windows_by_layer and shape.has_window and layers:
        raise InputError(
            f"{which} and max_window_layers = {layers}, which {family.architecture} does not "
            "read: it has the window in every layer. Set max_window_layers to 0, or "
            "sliding_window to null."
        )


def _says_nothing(key: str, value: Any) -> bool:
    off = value is False and key.startswith(("use_", "enable_"))
    return off or value is None or (isinstance(value, str | list | dict) and not value)


def _check_rope(hf_config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type")
    if kind not in _ROPE_KEYS:  # refused by its name elsewhere
        return
    _check_said_once(hf_config)
    for key, value in rope.items():
        if value is not None and key not in _ROPE_COMMON | _ROPE_KEYS[kind]:
            raise InputError(
                f"config.json has {key} = {value!r} in its rotary scaling, which rope_type "
                f"{kind!r} does not know. Remove it, or choose another model."
            )
    for key in ("rope_theta", *_ROPE_KEYS[kind]):
        if not is_positive(rope.get(key)):
            raise InputError(f"config.json must have a positive {key}, found {rope.get(key)!r}.")
    theta = hf_config.get("rope_theta")
    if theta is not None and theta != rope["rope_theta"]:
        raise InputError(
            f"config.json has rope_theta = {theta} and {rope['rope_theta']} among its "
            "rope_parameters. Remove the wrong one."
        )
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise InputError(
            f"config.json has low_freq_factor = {rope['low_freq_factor']}, expected less than "
            f"high_freq_factor = {rope['high_freq_factor']}: readers disagree on which frequencies "
            "are scaled. Correct them."
        )


def is_positive(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _check_said_once(hf_config: Mapping[str, Any]) -> None:
    """Refuse a rotary embedding that config.json says twice, in two ways."""
    said: dict[str, tuple[str, Any]] = {}
    for table in ("rope_scaling", "rope_parameters"):
        for key, value in (hf_config.get(table) or {}).items():
            meaning, name = ("rope_type" if key == "type" else key), f"{table}.{key}"
            first, found = said.setdefault(meaning, (name, value))
            if found != value:
                raise InputError(
                    f"config.json has {first} = {found!r} and {name} = {value!r}, two values of "
                    "one setting. Remove the wrong one."
                )


def written_config(
    config: PretrainedConfig, family: Family, shape: ModelShape, vocab_size: int
) -> dict[str, Any]:
    """A config.json with what was carried and nothing else; every reader computes that model."""
    rope = {k: v for k, v in config.rope_parameters.items() if v is not None and k != "type"}
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": shape.rms_eps,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        **_written_windows(family, shape),
        **(family.mixture.write(shape.experts) if family.mixture and shape.experts else {}),
    }


def _written_windows(family: Family, shape: ModelShape) -> dict[str, Any]:
    if not family.has_windows:
        return {}
    window = next((window for window in shape.windows if window is not None), None)
    keys: dict[str, Any] = {"sliding_window": window}
    if family.window_switch:
        keys["use_sliding_window"] = window is not None
    if family.windows_by_layer:
        kinds = ["full_attention" if w is None else "sliding_attention" for w in shape.windows]
        # vLLM takes mixed layers for full ones if this is the number of layers.
        layers = 0 if window is not None else shape.layers
        keys |= {"layer_types": kinds, "max_window_layers": layers}
    return keys
