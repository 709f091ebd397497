"""Megatron models from HF folders: the same function as transformers computes, sharded."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_tropd.config import Config, ParallelConfig
from megatron_tropd.config.megatron_fields import Table
from megatron_tropd.convert.checks import check_parallel
from megatron_tropd.convert.families import ModelShape, model_shape, rope_inverse_frequencies
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.sizes import padded_vocab_size as padded_vocab_size
from megatron_tropd.convert.sizes import stage_sizes
from megatron_tropd.mcore import platform
from megatron_tropd.mcore.attention import FusedAttention
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.layout import Layout, axis_sizes
from megatron_tropd.mcore.options import with_options


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm for layer specs without Transformer Engine.

    Megatron's own falls back to torch's, which it refuses under sequence parallelism because
    nobody marks the weight; here the weight carries the mark.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=platform.device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def resolve_dtype(name: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The compute type ``model.dtype`` stands for on this machine."""
    if name == "auto":
        return torch.bfloat16 if platform.has_cuda() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine imports here; then its layers are used."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE) and platform.has_cuda()


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's layers where it imports, else Megatron's own with our norm and
    attention.
    """
    experts = config.num_moe_experts
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm,
            num_experts=experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            use_te_activation_func=config.use_te_activation_func,
        )
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization="RMSNorm", num_experts=experts
        )
    )
    if experts is not None:
        # Megatron names this norm after a dense MLP that is not there; TE's layers do not.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = FusedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return spec


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    options: Mapping[str, Any] | None = None,
    *,
    table: Table = "model",
) -> TransformerConfig:
    """Megatron's description of the model; losses are per token, lengths vary.

    Args:
        shape: of the model.
        parallel: the layout.
        dtype: of parameters and activations.
        options: fields of Megatron's that the user set.
        table: where, for messages.

    Raises:
        ConfigError: Megatron refuses the options.
    """
    return with_options(
        TransformerConfig, _own_settings(shape, parallel, dtype), options or {}, table=table
    )


def _own_settings(
    shape: ModelShape, parallel: ParallelConfig, dtype: torch.dtype
) -> dict[str, Any]:
    cuda = platform.has_cuda()
    return dict(
        gated_linear_unit=True,
        activation_func=F.silu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_model_parallel_layout=_uneven_layout(shape.layers, parallel.num_chunks),
        **_p2p_settings(parallel),
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        perform_initialization=False,
        use_cpu_initialization=not cuda,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        **shape.megatron_fields(),
        **_axes(shape, parallel),
        **_window_settings(shape, parallel),
        **_expert_settings(shape),
    )


def build_of_run(
    config: Config,
    folder: HFFolder | MegatronFolder,
    who: Literal["student", "teacher"],
    *,
    layout: Layout,
    padded_vocab_size: int,
) -> DenseModel:
    """Build one of a run's models as the config wants it; see :func:`build_model`."""
    return build_model(
        folder,
        layout=layout,
        parallel=config.parallel,
        dtype=resolve_dtype(config.model.dtype),
        padded_vocab_size=padded_vocab_size,
        who=who,
        options=config.megatron.model if who == "student" else config.megatron.teacher,
    )


def build_model(
    folder: HFFolder | MegatronFolder,
    *,
    layout: Layout,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    padded_vocab_size: int,
    who: str = "model",
    options: Mapping[str, Any] | None = None,
) -> DenseModel:
    """This rank's part of the model in ``folder``, weights loaded, on this rank's device.

    Collective.

    Args:
        folder: architecture and weights, of either kind.
        layout: this rank's place.
        parallel: the layout.
        dtype: of parameters and activations.
        padded_vocab_size: rows of the embeddings, from :func:`padded_vocab_size`.
        who: how messages call the model.
        options: fields of Megatron's TransformerConfig that the user set.

    Returns:
        The model, in one chunk unless the pipeline is interleaved; ``module(tokens, positions,
        None)`` of one gives this shard's logits [batch, sequence, padded vocabulary / tensor] on
        the last stage.

    Raises:
        ConfigError: the layout does not divide the model.
        InputError: unsupported architecture, missing or surplus tensors, wrong shapes.

    Collectives: for tied embeddings, one all-reduce of the shard between first and last stage.
    """
    check_parallel(folder.config, parallel, who=who)
    shape = model_shape(folder.config)
    table: Table = "teacher" if who in ("teacher", "reference") else "model"
    config = transformer_config(shape, parallel, dtype, options, table=table)
    # Megatron's schedule of several chunks reads what concerns them all from the first one's.
    chunks = [
        _chunk(number, config, shape, layout, padded_vocab_size) for number in range(layout.vp_size)
    ]
    for chunk in chunks:
        frequencies = rope_inverse_frequencies(folder.config)
        chunk.rotary_pos_emb.inv_freq = frequencies.to(platform.device())
        chunk.to(platform.device())
        _mark_experts(chunk)
    built = DenseModel(chunks, folder.config, layout)
    built.load(folder)
    return built


def _chunk(
    number: int,
    config: TransformerConfig,
    shape: ModelShape,
    layout: Layout,
    padded_vocab_size: int,
) -> GPTModel:
    """One of this rank's chunks: the first of all has the embedding, the last the output layer."""
    of_rank = layout.chunks(shape.layers)
    # GPTModel is announced as deprecated in favour of HybridModel, which lacks the hook that
    # hands hidden states to a loss.
    return GPTModel(
        config,
        _block_spec(config, len(of_rank[number])),
        vocab_size=padded_vocab_size,
        max_sequence_length=shape.context,
        pre_process=layout.is_first_stage and number == 0,
        post_process=layout.is_last_stage and number == len(of_rank) - 1,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        pg_collection=layout.groups,
        vp_stage=number if len(of_rank) > 1 else None,
    )


def _mark_experts(model: GPTModel) -> None:
    """Give experts an optimizer of their own under expert parallelism of one rank too.

    Megatron does so above one; a checkpoint then moves between the two.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def _window_settings(shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    widest = max((window for window in shape.windows if window is not None), default=None)
    if widest is None:
        return {}
    # Megatron counts the positions before the token, and lists which layers have a window.
    has_window = [int(window is not None) for window in shape.windows]
    settings = {"window_size": (widest - 1, 0), "window_attn_skip_freq": has_window}
    # Transformer Engine's default, a ring, has no windows.
    return settings | ({"cp_comm_type": "all_gather"} if parallel.context > 1 else {})


def _p2p_settings(parallel: ParallelConfig) -> dict[str, bool]:
    """How neighbours exchange tensors.

    Of two stages each is the other's next one and previous one, and what a batch of sends carries
    both ways would be mixed up. Megatron's other way has one direction at a time.
    """
    if parallel.virtual_pipeline == 1:
        return {}
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def _axes(shape: ModelShape, parallel: ParallelConfig) -> dict[str, int | None]:
    sizes = axis_sizes(parallel)
    if shape.experts is None:  # a dense model may be trained beside a mixture that is spread
        sizes = {name: size for name, size in sizes.items() if not name.startswith("expert")}
    return sizes


def _expert_settings(shape: ModelShape) -> dict[str, Any]:
    # variable_seq_lengths is refused with the default dispatcher, dense model or not.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if shape.experts is None:
        return settings
    return settings | {
        "num_moe_experts": shape.experts.count,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # bfloat16 logits tie often, and a tie is broken one way here, another in the engine.
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": has_transformer_engine(),
    }


def _block_spec(config: TransformerConfig, layers: int) -> Any:
    spec = layer_spec(config)
    if has_transformer_engine():
        return spec
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _uneven_layout(layers: int, chunks: int) -> list[list[str]] | None:
    """Megatron's description of chunks of unequal size; None where they are equal."""
    if layers % chunks == 0:
        return None
    parts = [["decoder"] * size for size in stage_sizes(layers, chunks)]
    parts[0].insert(0, "embedding")
    parts[-1].append("loss")
    return parts
