"""Pretrain a GPT with Megatron's training loop on Megatron's indexed data.

Megatron's wheels carry the loop (``megatron.training.pretrain``) but no script that calls it; this
one does, with megatron-core 0.17, 0.18 and 0.19. All options are Megatron's own.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.training import argument_utils, arguments, get_args, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

NOT_HERE = (
    *("sft", "fim_data", "dataloader_inter_document_masking", "logits_load_dir"),
    *("spec", "heterogeneous_layers_config_path", "experimental_attention_variant"),
    *("multi_latent_attention", "mtp_num_layers", "qk_l2_norm", "yaml_cfg"),
)
"""Options for data, layers and losses that this script has no code for."""


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any
) -> GPTModel:
    """This pipeline stage's part of the model, or its virtual stage's."""
    args = get_args()
    if asked := [name for name in NOT_HERE if getattr(args, name, None)]:
        raise SystemExit(f"This script does not know {asked}; Megatron's pretrain_gpt.py does.")
    if args.transformer_impl == "local":
        spec = get_gpt_layer_local_spec(
            args.num_experts,
            args.moe_grouped_gemm,
            args.qk_layernorm,
            normalization=args.normalization,
        )
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(
            args.num_experts, args.moe_grouped_gemm, args.qk_layernorm
        )
    return GPTModel(
        core_transformer_config_from_args(args),
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
    )


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, number of tokens, and both for the log, which divides them."""
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    report = {"lm loss": torch.stack([loss.detach(), num_tokens])}
    return loss, num_tokens.to(torch.int), report


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Forward pass of one micro-batch, and what makes a loss of it."""
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Training, validation and test data of ``--data-path`` (or ``--mock-data``).

    Each virtual pipeline stage asks for them.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    settings = {field.name for field in fields(GPTDatasetConfig)} & vars(args).keys()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        **{name: getattr(args, name) for name in settings},
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, lambda: True, config).build()


datasets_provider.is_distributed = True  # every rank reads its own data


def command_line() -> dict[str, Any]:
    """Parse the options; what ``pretrain`` of this version wants to know of them."""
    defaults = {"tokenizer_type": "HuggingFaceTokenizer"}
    if not hasattr(arguments, "parse_and_validate_args"):  # megatron-core 0.17 parses in pretrain
        return {"args_defaults": defaults}
    args = arguments.parse_and_validate_args(args_defaults=defaults)
    return {"cfg_container": argument_utils.pretrain_cfg_container_from_args(args)}


def train(**settings: Any) -> None:
    """Run Megatron's loop."""
    pretrain(
        train_valid_test_dataset_provider=datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **settings,
    )


if __name__ == "__main__":
    train(**command_line())
