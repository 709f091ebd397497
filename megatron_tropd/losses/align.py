"""Re-sharding a vocabulary: a teacher whose shards do not cover the student's columns.

A tokenizer of 151,643 tokens comes padded to 151,936 columns in one model and to 152,064 in
another, so equal shards of the two hold different columns on every rank but the first.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import check_bounds, place_in


def align_output_weight(
    weight_vH: Tensor,
    *,
    have: Sequence[int],
    want: Sequence[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Move the rows of an output layer to the ranks that hold the same columns of another one.

    Do it once, after loading: the losses take student and teacher on the same columns.

    Args:
        weight_vH: [v, H] this rank's rows, have[rank] to have[rank + 1].
        have: R + 1 column ids, the bounds of the shards as they are.
        want: R + 1 column ids, the bounds of the shards as they should be. Columns beyond
            have[-1] come out as 0: they are padding.
        group: the ranks; None: there is one.

    Returns:
        [want[rank + 1] - want[rank], H] a new tensor of the same dtype.

    Raises:
        ValueError: the bounds do not describe the group or the tensor.

    Collectives: 1 all-to-all; each row travels at most once.
    """
    size, rank = place_in(group)
    check_bounds(have, group, weight_vH.shape[0])
    check_bounds(want, group)
    mine = slice(have[rank], have[rank + 1])
    sent = [_overlap(mine, slice(want[r], want[r + 1])) for r in range(size)]
    wanted = slice(want[rank], want[rank + 1])
    received = [_overlap(slice(have[r], have[r + 1]), wanted) for r in range(size)]

    aligned = weight_vH.new_zeros(wanted.stop - wanted.start, *weight_vH.shape[1:])
    send = torch.cat([weight_vH[s.start - mine.start : s.stop - mine.start] for s in sent])
    counts_in = [s.stop - s.start for s in received]
    arrived = send
    if size > 1:
        arrived = send.new_empty(sum(counts_in), *send.shape[1:])
        counts_out = [s.stop - s.start for s in sent]
        dist.all_to_all_single(arrived, send, counts_in, counts_out, group=group)
    for columns, rows in zip(received, arrived.split(counts_in), strict=True):
        aligned[columns.start - wanted.start : columns.stop - wanted.start] = rows
    return aligned


def align_logits(
    logits_Tv: Tensor, *, have: Sequence[int], want: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """The same for logits [T, v]. Collectives: 1 all-to-all."""
    columns_vT = logits_Tv.t().contiguous()
    return align_output_weight(columns_vT, have=have, want=want, group=group).t().contiguous()


def _overlap(a: slice, b: slice) -> slice:
    start = max(a.start, b.start)
    # An empty overlap must still be a legal slice of ``a``.
    start = min(max(start, a.start), a.stop)
    return slice(start, max(start, min(a.stop, b.stop)))
