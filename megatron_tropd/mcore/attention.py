"""Core attention for layer specs without Transformer Engine: torch's fused kernels."""

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class FusedAttention(DotProductAttention):
    """Megatron's core attention, causal, by ``scaled_dot_product_attention``.

    Megatron's own writes the scores of all heads, [b, n, s, s], several times over. What torch's
    kernels do not cover (masks given, dropout, cached keys) is left to it.

    Megatron's own refuses context parallelism. Here keys and values of whole rows are gathered;
    queries are those of the rank (``layout.zigzag``). s = positions of the rank, S = of a row.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Take Megatron's arguments."""
        undivided = copy.copy(config)
        undivided.context_parallel_size = 1
        super().__init__(undivided, *args, **kwargs)
        self.config = config
        self._window = self.scale_mask_softmax.window_size
        if config.context_parallel_size > 1:
            # Megatron's softmax would take a rank's queries for a whole row.
            self.scale_mask_softmax.window_size = None

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
        covered = self._covered(query, key, attention_mask, args, kwargs)
        if self.config.context_parallel_size > 1:
            key, value = _whole_rows(key, value, self.pg_collection.cp)
            if not covered:
                hidden = self._hidden(query, len(key))
                attention_mask = hidden if attention_mask is None else hidden | attention_mask
        if not covered:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        # No chunk needs keys behind its own end.
        chunks = [
            self._attend(q, key[: start + len(q)], value[: start + len(q)])
            for q, start in self._chunks(query)
        ]
        return torch.cat(chunks) if len(chunks) > 1 else chunks[0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from the last positions of the keys; shapes as of :meth:`forward`."""
        copies = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
        # The kernels for CUDA share keys and values among queries; those for CPUs copy them, too.
        shared = copies > 1 and query.is_cuda
        if copies > 1 and not shared:
            key, value = (tensor.repeat_interleave(copies, dim=2) for tensor in (key, value))
        everything = self._window is None or len(key) <= self._window[0] + 1
        causal = everything and len(query) == len(key)
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if causal else self._visible(query, len(key)),
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=shared,
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _visible(self, query: Tensor, stop: int) -> Tensor:
        """[s, stop] bool, true if a query, of the last places before ``stop``, sees the key."""
        places = torch.arange(stop, device=query.device)
        behind = places[-len(query) :, None] - places
        before, after = self._window or (stop, 0)
        return (behind <= before) & (behind >= -after)

    def _hidden(self, query: Tensor, length: int) -> Tensor:
        """[s, S] bool, true if a query of a context-parallel rank is not to see the key."""
        visible = [self._visible(q, start + len(q)) for q, start in self._chunks(query)]
        return ~torch.cat([F.pad(part, (0, length - part.shape[1])) for part in visible])

    def _chunks(self, query: Tensor) -> list[tuple[Tensor, int]]:
        """Queries that follow each other, and the place of their first in the row."""
        if self.config.context_parallel_size == 1:
            return [(query, 0)]
        group, length = self.pg_collection.cp, len(query) // 2
        starts = (group.rank() * length, (2 * group.size() - 1 - group.rank()) * length)
        return list(zip(query.chunk(2), starts, strict=True))

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


def _whole_rows(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[s, ...] keys and values of each context-parallel rank -> [S, ...], in the row's order.

    Collectives: 1 all-gather, in the backward pass 1 reduce-scatter.
    """
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    # [rank, front or back, place in the chunk, ...]; the chunks at the back run the other way.
    front, back = both.unflatten(0, (group.size(), 2, -1)).unbind(1)
    whole = torch.cat([front, back.flip(0)]).flatten(0, 1)
    key, value = whole.split([key.shape[-1], value.shape[-1]], dim=-1)
    return key, value
