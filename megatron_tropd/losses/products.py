"""Matrix products of an output layer: float32 out of whatever precision goes in.

Shape suffixes: T = tokens, v = columns of this rank's shard, H = hidden.
"""

import torch
from torch import Tensor

_BLOCK = 1024


def write_logits(hidden_TH: Tensor, weight_vH: Tensor, out_Tv: Tensor) -> None:
    """out = hidden @ weight^T.

    Args:
        hidden_TH: [T, H] any float dtype.
        weight_vH: [v, H] the same dtype.
        out_Tv: [T, v] float32, overwritten. On CUDA the float32 accumulators of lower-precision
            products arrive as they are; elsewhere they are rounded to that precision, as an output
            layer in it does.
    """
    if hidden_TH.is_cpu and hidden_TH.dtype == torch.float32:
        # Measured: blocks of columns that stay in the cache take a tenth less time.
        for begin in range(0, weight_vH.shape[0], _BLOCK):
            columns = slice(begin, begin + _BLOCK)
            torch.mm(hidden_TH, weight_vH[columns].t(), out=out_Tv[:, columns])
    elif hidden_TH.dtype == torch.float32:
        torch.mm(hidden_TH, weight_vH.t(), out=out_Tv)
    elif hidden_TH.is_cuda:
        torch.mm(hidden_TH, weight_vH.t(), out_dtype=torch.float32, out=out_Tv)
    else:
        out_Tv.copy_(hidden_TH @ weight_vH.t())


def write_hidden_grad(grad_Tv: Tensor, weight_vH: Tensor, out_TH: Tensor) -> None:
    """out = grad @ weight, in the dtype of the weight.

    Args:
        grad_Tv: [T, v] float32, gradient of the logits.
        weight_vH: [v, H].
        out_TH: [T, H] the weight's dtype, overwritten.
    """
    torch.mm(grad_Tv.to(weight_vH.dtype), weight_vH, out=out_TH)


def add_weight_grad(grad_Tv: Tensor, hidden_TH: Tensor, total_vH: Tensor, *, first: bool) -> None:
    """total += grad^T @ hidden, accumulated in float32.

    Args:
        grad_Tv: [T, v] float32, gradient of the logits.
        hidden_TH: [T, H] any float dtype.
        total_vH: [v, H] float32, added to.
        first: overwrite ``total_vH`` instead, whatever it holds.
    """
    if hidden_TH.is_cuda and hidden_TH.dtype != torch.float32:
        part_vH = torch.mm(grad_Tv.to(hidden_TH.dtype).t(), hidden_TH, out_dtype=torch.float32)
        total_vH.copy_(part_vH) if first else total_vH.add_(part_vH)
    elif first:
        torch.mm(grad_Tv.t(), hidden_TH.float(), out=total_vH)
    else:
        total_vH.addmm_(grad_Tv.t(), hidden_TH.float())
