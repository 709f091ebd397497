"""Hidden states that are sharded or shared over a group, with the gradient each needs.

Shape suffixes: T = tokens, H = hidden, R = ranks of the group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses.first_order import first_order
from megatron_tropd.losses.vocab_parallel import place_in


def sum_gradient(hidden_TH: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Unchanged forward; backward sums the ranks' gradients.

    Args:
        hidden_TH: [T, H] the same on every rank.
        group: the ranks; None: there is one.

    Returns:
        [T, H]

    Collectives: forward none; backward 1 all-reduce (SUM) of [T, H].
    """
    apply: Callable[[Tensor, object], Tensor] = _SumGradient.apply
    return hidden_TH if place_in(group)[0] == 1 else apply(hidden_TH, group)


def gather_rows(hidden_tH: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All rows of a sequence-parallel tensor; backward sums the gradients and scatters them.

    Args:
        hidden_tH: [T / R, H] this rank's rows.
        group: the ranks; None: there is one.

    Returns:
        [T, H]

    Collectives: forward 1 all-gather, backward 1 reduce-scatter of [T, H].
    """
    apply: Callable[[Tensor, object], Tensor] = _GatherRows.apply
    return hidden_tH if place_in(group)[0] == 1 else apply(hidden_tH, group)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden_TH.view_as(hidden_TH)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total_TH = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_TH, group=ctx.group)
        return total_TH, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_tH: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole_TH = hidden_tH.new_empty(group.size() * hidden_tH.shape[0], hidden_tH.shape[1])
        dist.all_gather_into_tensor(whole_TH, hidden_tH.contiguous(), group=group)
        return whole_TH

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TH = grads[0].contiguous()
        mine_tH = grad_TH.new_empty(grad_TH.shape[0] // ctx.group.size(), grad_TH.shape[1])
        dist.reduce_scatter_tensor(mine_tH, grad_TH, group=ctx.group)
        return mine_tH, None
