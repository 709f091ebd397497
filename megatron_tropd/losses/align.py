"""Re-sharding a vocabulary: a teacher whose shards do not cover the student's columns.

A tokenizer of 151,643 tokens comes padded to 151,936 columns in one model and to 152,064 in
another, so equal shards of the two hold different columns on every rank but the first.
"""

from collections.abc import Sequence
from itertools import pairwise, starmap

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
    check_bounds(have, group, weight_vH.shape[0])
    check_bounds(want, group)
    shards = [list(starmap(slice, pairwise(bounds))) for bounds in (have, want)]
    return send_rows(weight_vH, have=shards[0], want=shards[1], group=group)


def send_rows(
    rows_nH: Tensor,
    *,
    have: Sequence[slice],
    want: Sequence[slice],
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Send the rows of a matrix to the ranks that want them.

    Args:
        rows_nH: [n, H] this rank's rows; of the right type and H where it has none, too.
        have: rows of each rank. Two ranks have the same rows, or none in common.
        want: rows that each rank wants. Those that nobody has come out as 0.
        group: the ranks; None: there is one.

    Returns:
        [wanted, H] a new tensor of the same dtype.

    Collectives: 1 all-to-all; a row travels at most once to each rank that wants it.
    """
    size, rank = place_in(group)
    senders = [_senders(have, receiver) for receiver in range(size)]

    def travels(sender: int, receiver: int) -> slice:
        held = have[sender]
        sent = sender in senders[receiver]
        return _overlap(held, want[receiver] if sent else slice(held.start, held.start))

    mine, wanted = have[rank], want[rank]
    sent = [travels(rank, receiver) for receiver in range(size)]
    received = [travels(sender, rank) for sender in range(size)]
    send = torch.cat([rows_nH[s.start - mine.start : s.stop - mine.start] for s in sent])
    counts_in = [s.stop - s.start for s in received]
    arrived = all_to_all_rows(send, [s.stop - s.start for s in sent], counts_in, group=group)
    aligned = rows_nH.new_zeros(wanted.stop - wanted.start, *rows_nH.shape[1:])
    for columns, rows in zip(received, arrived.split(counts_in), strict=True):
        aligned[columns.start - wanted.start : columns.stop - wanted.start] = rows
    return aligned


def all_to_all_rows(
    rows_nH: Tensor,
    counts_out: Sequence[int],
    counts_in: Sequence[int],
    *,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Send the first rows to the first rank, the next to the next, as many as the counts say.

    Returns:
        [sum(counts_in), H] rows of all ranks, the first rank's first.

    Collectives: 1 all-to-all; none for a group of one.
    """
    if place_in(group)[0] == 1:
        return rows_nH
    arrived = rows_nH.new_empty(sum(counts_in), *rows_nH.shape[1:])
    dist.all_to_all_single(arrived, rows_nH, list(counts_in), list(counts_out), group=group)
    return arrived


def _senders(have: Sequence[slice], receiver: int) -> set[int]:
    """The ranks that give a receiver what it wants: of those that have the same rows itself, or one
    of them in turn.
    """
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, rows in enumerate(have):
        holders.setdefault((rows.start, rows.stop), []).append(rank)
    return {
        receiver if receiver in ranks else ranks[receiver % len(ranks)]
        for ranks in holders.values()
    }


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
