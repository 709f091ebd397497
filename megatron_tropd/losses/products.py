"""Matrix products of an output layer: float32 out of whatever precision goes in.

Shape suffixes: T = tokens, v = columns of this rank's shard, H = hidden.
"""

import torch
from torch import Tensor

_BLOCK = 1024
_LOW = (torch.bfloat16, torch.float16)
_LARGEST_EXPONENT = 14
"""Of a gradient as float16 takes it: 2^14 is far from its end, and leaves 38 binary places."""


def write_logits(hidden_TH: Tensor, weight_vH: Tensor, out_Tv: Tensor) -> None:
    """Out = hidden @ weight^T.

    Args:
        hidden_TH: [T, H] any float dtype.
        weight_vH: [v, H] the same dtype.
        out_Tv: [T, v] float32, overwritten. On CUDA the float32 accumulators of lower-precision
            products arrive as they are; elsewhere they are rounded to that precision, as an output
            layer in it does.
    """
    if hidden_TH.is_cuda and hidden_TH.dtype in _LOW:
        torch.mm(hidden_TH, weight_vH.t(), out_dtype=torch.float32, out=out_Tv)
        return
    if hidden_TH.is_cuda and hidden_TH.dtype == torch.float32:
        torch.mm(hidden_TH, weight_vH.t(), out=out_Tv)
        return
    # In blocks of columns: measured, those that stay in the cache take a tenth less time, and what
    # has to be converted to float32 is never all there.
    for begin in range(0, weight_vH.shape[0], _BLOCK):
        columns = slice(begin, begin + _BLOCK)
        if hidden_TH.dtype == torch.float32:
            torch.mm(hidden_TH, weight_vH[columns].t(), out=out_Tv[:, columns])
        else:
            out_Tv[:, columns].copy_(hidden_TH @ weight_vH[columns].t())


def write_hidden_grad(grad_Tv: Tensor, weight_vH: Tensor, out_TH: Tensor) -> None:
    """Out = grad @ weight.

    Args:
        grad_Tv: [T, v] gradient of the logits, in float32 or already in the weight's dtype.
        weight_vH: [v, H] any float dtype.
        out_TH: [T, H] overwritten, in float32, or the weight's dtype if that has more digits.
    """
    dtype = weight_vH.dtype
    if dtype not in _LOW:
        torch.mm(grad_Tv.to(dtype), weight_vH, out=out_TH)
    elif weight_vH.is_cuda:
        fitted_Tv, exponent_T1 = _fit(grad_Tv, dtype)
        torch.mm(fitted_Tv, weight_vH, out_dtype=torch.float32, out=out_TH)
        if exponent_T1 is not None:
            out_TH.copy_(torch.ldexp(out_TH, exponent_T1))
    elif dtype == torch.bfloat16:
        out_TH.copy_(grad_Tv.to(dtype) @ weight_vH)
    else:
        out_TH.zero_()
        for begin in range(0, weight_vH.shape[0], _BLOCK):
            columns = slice(begin, begin + _BLOCK)
            out_TH.addmm_(grad_Tv[:, columns], weight_vH[columns].float())


def add_weight_grad(grad_Tv: Tensor, hidden_TH: Tensor, total_vH: Tensor, *, first: bool) -> None:
    """Total += grad^T @ hidden, accumulated in float32.

    Args:
        grad_Tv: [T, v] gradient of the logits, in float32 or already in that of the hidden states.
        hidden_TH: [T, H] any float dtype.
        total_vH: [v, H] float32, added to.
        first: overwrite ``total_vH`` instead, whatever it holds.
    """
    if hidden_TH.is_cuda and hidden_TH.dtype == torch.float16:
        fitted_Tv, exponent = _fit(grad_Tv, hidden_TH.dtype, together=True)
        part_vH = torch.mm(fitted_Tv.t(), hidden_TH, out_dtype=torch.float32)
        if exponent is not None:
            part_vH = torch.ldexp(part_vH, exponent)
        total_vH.copy_(part_vH) if first else total_vH.add_(part_vH)
        return
    if hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16:
        low = grad_Tv.to(torch.bfloat16).t(), hidden_TH
        if first:
            torch.mm(*low, out_dtype=torch.float32, out=total_vH)
        else:
            # In one product: a second [v, H] would be written and read again for every chunk.
            torch.addmm(total_vH, *low, out_dtype=torch.float32, out=total_vH)
        return
    high = grad_Tv.float().t(), hidden_TH.float()
    if first:
        torch.mm(*high, out=total_vH)
    else:
        total_vH.addmm_(*high)


def _fit(
    grad_Tv: Tensor, dtype: torch.dtype, *, together: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A gradient in lower precision, and the power of 2 it was divided by.

    float16 ends at 2^-24, where most of a vocabulary's probabilities are, so that rows are brought
    to one size first, or ``together`` by one power. A row without a finite size, or of zeros, stays
    as it is. The exponent is [T, 1] or [1, 1] int32, None if nothing was divided.
    """
    if dtype != torch.float16 or not grad_Tv.numel():
        return grad_Tv.to(dtype), None
    low_T1, high_T1 = grad_Tv.aminmax(dim=-1, keepdim=True)
    size_T1 = torch.maximum(high_T1, -low_T1)
    usable_T1 = size_T1.isfinite() & (size_T1 > 0)
    if together:
        size_T1 = torch.where(usable_T1, size_T1, 0.0).amax(dim=0, keepdim=True)
        usable_T1 = size_T1 > 0
    exponent_T1 = torch.frexp(size_T1).exponent - _LARGEST_EXPONENT
    exponent_T1 = torch.where(usable_T1, exponent_T1, 0)
    fitted_Tv = torch.empty_like(grad_Tv, dtype=dtype)
    factor_T1 = torch.ldexp(torch.ones_like(size_T1), -exponent_T1)
    return torch.mul(grad_Tv, factor_T1, out=fitted_Tv), exponent_T1
