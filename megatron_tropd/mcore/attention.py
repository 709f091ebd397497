"""Core attention for layer specs without Transformer Engine: torch's fused kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class FusedAttention(DotProductAttention):
    """Megatron's core attention, causal, by ``scaled_dot_product_attention``.

    Megatron's own writes the scores of all heads, [b, n, s, s], several times over. What torch's
    kernels do not cover (masks given, dropout, cached keys) is left to it.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[s, b, n, d] queries and [s, b, g, d] keys and values -> [s, b, n d]."""
        if not self._covered(query, key, attention_mask, args, kwargs):
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        copies = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        # The kernels for CUDA share keys and values among queries; those for CPUs copy them, too.
        shared = copies > 1 and query.is_cuda
        if copies > 1 and not shared:
            key, value = (tensor.repeat_interleave(copies, dim=2) for tensor in (key, value))
        visible = self._inside_window(query)
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=shared,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _inside_window(self, query: Tensor) -> Tensor | None:
        """[s, s] bool, true where a layer with a window looks; None where it sees everything."""
        window, length = self.scale_mask_softmax.window_size, query.shape[0]
        if window is None or length <= window[0] + 1:
            return None
        everything = torch.ones(length, length, dtype=torch.bool, device=query.device)
        return everything.tril(window[1]).triu(-window[0])

    def _covered(
        self, query: Tensor, key: Tensor, mask: Tensor | None, args: tuple, kwargs: dict
    ) -> bool:
        extras = [*args[1:], *(v for name, v in kwargs.items() if name != "attn_mask_type")]
        return (
            mask is None
            and all(extra is None for extra in extras)
            and query.shape[0] == key.shape[0]
            and self.attn_mask_type.name == "causal"
            and self.softmax_offset is None
            and not (self.training and self.attention_dropout.p)
        )
