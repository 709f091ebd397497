"""Attention of ranks that share rows is that of one rank: outputs and gradients."""

from typing import Any

import pytest
import torch

from tests.ranks import run_with_env

LENGTH, ROWS, HEADS, GROUPS, WIDTH = 24, 2, 4, 2, 8
CASES: list[tuple[int | None, bool, torch.dtype]] = [
    (None, False, torch.float32),
    (None, False, torch.bfloat16),
    (7, False, torch.float32),
    (None, True, torch.float32),
    (7, True, torch.float32),
]
"""Window, whether a mask is given (two documents in the first row), type."""


def _attention(context: int, window: int | None, ranks: Any) -> Any:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_tropd.mcore.attention import FusedAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=context,
        window_size=window and (window - 1, 0),
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    return FusedAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ranks.groups,
    )


def _hidden(window: int | None) -> torch.Tensor:
    """[rows, 1, length, length] true where a query is not to look, as Megatron's masks are."""
    places = torch.arange(LENGTH)
    behind = places[:, None] - places
    hidden = ((behind < 0) | (behind >= (window or LENGTH))).repeat(ROWS, 1, 1, 1)
    hidden[0] |= (places[:, None] >= 10) & (places < 10)
    return hidden


def _compare(context: int) -> None:
    from megatron_tropd.config import ParallelConfig
    from megatron_tropd.mcore import parallel
    from megatron_tropd.mcore.layout import zigzag

    ranks = parallel.initialize(ParallelConfig(context=context), seed=1)
    here = zigzag(LENGTH, ranks.cp_rank, context)
    for window, masked, dtype in CASES:
        draw = torch.Generator().manual_seed(3)
        sizes = {"query": HEADS, "key": GROUPS, "value": GROUPS, "gradient": HEADS}
        whole = {
            name: torch.randn(LENGTH, ROWS, heads, WIDTH, generator=draw).to(dtype)
            for name, heads in sizes.items()
        }
        gradient = whole.pop("gradient").flatten(2)
        mask = _hidden(window) if masked else None
        # Megatron's softmax replaces a mask by that of the window: here it is in the mask.
        alone = _attention(1, None if masked else window, ranks)
        expected = _run(alone, whole, mask, gradient)
        part = {name: tensor[here] for name, tensor in whole.items()}
        given = None if mask is None else _hidden(None)[:, :, here]
        shared = _attention(context, window, ranks)
        found = _run(shared, part, given, gradient[here])
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name][here], **close)
    parallel.shutdown()


def _run(
    attention: Any,
    inputs: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    gradient: torch.Tensor,
) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = attention(*leaves.values(), mask)
    output.backward(gradient)
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("context", [2, 3])
def test_attention_of_ranks_that_share_rows_is_that_of_one(context: int) -> None:
    run_with_env(context, _compare, context)
