"""Parts that layers of several families share: Megatron's names, made of HF's.

Names on Megatron's side are those of its checkpoints: norms are fused into the linear layer that
follows, where that layer is dense. Where a model keeps its norms apart,
``megatron_tropd.mcore.weights`` translates.
"""

from megatron_tropd.convert.families._base import Entry, Mixture, ModelShape
from megatron_tropd.convert.families._ops import FusedQKV, GateUp, Replicated, Sharded


def standard_layer(shape: ModelShape, hf: str, names: Mixture | None) -> list[Entry]:
    """Attention with the biases and norms that ``shape`` says, and a gated MLP or experts.

    Args:
        names: of the experts; None: the family is dense.
    """
    return [
        *attention(shape, hf),
        *(qkv_biases(shape, hf) if shape.qkv_bias else []),
        *(qk_norms(shape, hf) if shape.qk_norm else []),
        *(mixture(shape, hf, names) if names else gated_mlp(shape, hf)),
    ]


def attention(shape: ModelShape, hf: str) -> list[Entry]:
    """Input norm, grouped-query attention, output projection."""
    norm = Replicated(f"{hf}.input_layernorm.weight", (shape.hidden,))
    output = (shape.hidden, shape.heads * shape.head_dim)
    return [
        Entry("self_attention.linear_qkv.layer_norm_weight", norm),
        Entry("self_attention.linear_qkv.weight", _qkv(shape, hf, "weight", (shape.hidden,))),
        Entry(
            "self_attention.linear_proj.weight",
            Sharded(f"{hf}.self_attn.o_proj.weight", output, dim=1),
        ),
    ]


def qkv_biases(shape: ModelShape, hf: str) -> list[Entry]:
    """Biases of query, key and value."""
    return [Entry("self_attention.linear_qkv.bias", _qkv(shape, hf, "bias", ()))]


def qk_norms(shape: ModelShape, hf: str) -> list[Entry]:
    """One norm for the heads of the queries, one for those of the keys."""
    return [
        Entry(
            f"self_attention.{letter}_layernorm.weight",
            Replicated(f"{hf}.self_attn.{letter}_norm.weight", (shape.head_dim,)),
        )
        for letter in "qk"
    ]


def gated_mlp(shape: ModelShape, hf: str) -> list[Entry]:
    """Norm, gate and up projection in one, down projection."""
    mlp, sizes = f"{hf}.mlp", (shape.ffn, shape.hidden)
    norm = Replicated(f"{hf}.post_attention_layernorm.weight", (shape.hidden,))
    return [
        Entry("mlp.linear_fc1.layer_norm_weight", norm),
        Entry(
            "mlp.linear_fc1.weight",
            GateUp(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight", sizes),
        ),
        Entry("mlp.linear_fc2.weight", Sharded(f"{mlp}.down_proj.weight", sizes[::-1], dim=1)),
    ]


def mixture(shape: ModelShape, hf: str, names: Mixture) -> list[Entry]:
    """Norm, router and experts; every expert is a gated MLP."""
    block = f"{hf}.{names.block}"
    assert shape.experts is not None
    norm = Replicated(f"{hf}.post_attention_layernorm.weight", (shape.hidden,))
    router = Replicated(f"{block}.gate.weight", (shape.experts.count, shape.hidden))
    entries = [Entry("pre_mlp_layernorm.weight", norm), Entry("mlp.router.weight", router)]
    sizes = (shape.experts.ffn, shape.hidden)
    for n in range(shape.experts.count):
        gate, up, down = (f"{block}.experts.{n}.{name}.weight" for name in names.gate_up_down)
        fc1, fc2 = GateUp(gate, up, sizes), Sharded(down, sizes[::-1], dim=1)
        entries += [
            Entry("mlp.experts.experts.linear_fc1.weight", fc1, expert=n),
            Entry("mlp.experts.experts.linear_fc2.weight", fc2, expert=n),
        ]
    return entries


def _qkv(shape: ModelShape, hf: str, kind: str, columns: tuple[int, ...]) -> FusedQKV:
    query, key, value = (f"{hf}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return FusedQKV(query, key, value, shape.heads, shape.kv_heads, shape.head_dim, columns)
