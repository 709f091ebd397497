"""Gradients that cannot be differentiated again, and say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_Gradients = tuple[Tensor | None, ...]


def first_order(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Make a second derivative through an ``autograd.Function`` an error, not a silent zero.

    torch's ``once_differentiable`` does that only where the incoming gradient is differentiable
    itself, which that of ``loss.sum()`` is not.

    Args:
        backward: of the function, as a plain function: below ``@staticmethod``.

    Returns:
        The same, whose gradients raise RuntimeError when they are differentiated.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> _Gradients:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # the rule: nobody asked for create_graph
            return made
        last: Callable[[Tensor], Tensor] = _Last.apply
        return tuple(None if grad is None else last(grad.requires_grad_()) for grad in made)

    return once


class _Last(torch.autograd.Function):
    """The end of what can be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Gradients:
        raise RuntimeError(
            "Expected first derivatives of a tropd loss only, found a second: its gradient is a "
            "closed form that autograd cannot differentiate. Leave create_graph out, or detach "
            "the gradients before they are used in a loss."
        )
