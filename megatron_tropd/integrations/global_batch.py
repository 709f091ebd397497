"""From what Megatron's data loaders give to micro-batches that are the same on a model's ranks.

Two kinds of items are understood, told apart by their keys: those of Megatron's GPT datasets, and
trajectories (``data.recorded``), which know who wrote a token and how likely it was.

B = rows of a micro-batch, S = sequence length, N = micro-batches of this data-parallel rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.batch import upload

TEXT = ("tokens", "labels", "loss_mask", "position_ids")
"""Keys of a given text: an item of Megatron's GPT datasets."""
TRAJECTORY = (
    "tokens",
    "labels",
    "position_ids",
    "loss_weights",
    "teacher_written",
    "rollout_logprobs",
    "response_positions",
    "sample_id",
)
"""Keys of a recorded or fresh trajectory."""
_BESIDE = frozenset({"attention_mask", "dataset_id"})
"""What items may hold besides: the mask, used where it is asked for, and where a blend took it."""
_NOTHING, _TEXT, _TRAJECTORY = 0, 1, 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch; position s of a row predicts ``labels`` at s."""

    tokens: Tensor
    """[B, S] int64."""
    labels: Tensor
    """[B, S] int64 the next token."""
    position_ids: Tensor
    """[B, S] int64."""
    loss_weights: Tensor
    """[B, S] float32 factor of each label's loss, 0 where it has none."""
    teacher_written: Tensor
    """[B, S] bool, true where the teacher wrote the label."""
    rollout_logprobs: Tensor
    """[B, S] float32 log-prob of the label under the policy that sampled it, in nats."""
    response_positions: Tensor
    """[B, S] int64 index of the label after the prompt, 0 elsewhere: keys its random draw."""
    sample_ids: Tensor
    """[B] int64 key of each row's random draws."""
    attention_mask: Tensor | None
    """[B, 1, S, S] bool, true where nothing is to be seen; None: causal."""
    loss_at: Tensor
    """[T] int64 b x S + s of each label that has a loss, ascending."""
    sampled: bool
    """Whether the rows are trajectories; else they are given text."""

    @property
    def loss_mask(self) -> Tensor:
        """[B, S] bool, true where the label has a loss."""
        return self.loss_weights != 0

    def of_loss_tokens(self, values_BS: Tensor) -> Tensor:
        """[T] the values at the labels that have a loss."""
        return values_BS.flatten().index_select(0, self.loss_at)


def draw(
    iterator: Iterator[Mapping[str, Tensor]] | None,
    count: int,
    *,
    shape: tuple[int, int],
    masked: bool,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Batch]:
    """Take a global batch's share of this rank from its loader; all tensor ranks get the same.

    Args:
        iterator: Megatron's. Tensor ranks other than the first may have none, and so may stages
            in the middle of a pipeline; whoever has one advances it.
        count: N.
        shape: (B, S).
        masked: whether the items' own ``attention_mask`` is to be used.
        group: tensor-parallel group; its first rank's items are used.
        device: of the result.

    Returns:
        N micro-batches; without loss tokens where the stage has no data.

    Raises:
        InputError: the data ended; an item lacks keys or has another shape; there are none to take
            masks from.

    Collectives: on ``group`` 3 broadcasts, of [1 + N] and [N, 6, B, S] int64 and [N, 2, B, S]
    float32; with ``masked`` 1 of [N, B, S, S] bytes.
    """
    try:
        items = [] if iterator is None else [next(iterator) for _ in range(count)]
    except StopIteration:
        raise InputError(
            f"Expected {count} micro-batches for the next step, found the data at its end. Give "
            "more data, ask for fewer iterations, or, for several epochs, use --dataloader-type "
            "cyclic."
        ) from None
    return broadcast_items(items, count, shape=shape, masked=masked, group=group, device=device)


def broadcast_items(
    items: Sequence[Mapping[str, Tensor]],
    count: int,
    *,
    shape: tuple[int, int],
    masked: bool,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Batch]:
    """Make micro-batches as :func:`draw` does, of N items on the first rank, or of none."""
    # On the host first: one copy for each, and none that the host waits for.
    head = torch.zeros(1 + count, dtype=torch.int64)
    ints = torch.zeros(count, 6, *shape, dtype=torch.int64)
    floats = torch.zeros(count, 2, *shape, dtype=torch.float32)
    masks = torch.zeros(count, shape[0], 1, shape[1], shape[1], dtype=torch.uint8)
    masks = masks if masked else masks[:0]
    if group.rank() == 0 and items:
        head[0] = _kind(items)
        _fill(items, ints, floats, masks, _kind(items))
        head[1:] = (floats[:, 0] != 0).flatten(1).sum(dim=1)
    head, ints, floats, masks = (upload(tensor, device) for tensor in (head, ints, floats, masks))
    source = dist.get_global_rank(group, 0)
    for tensor in (head, ints, floats, masks):
        if tensor.numel():
            dist.broadcast(tensor, source, group=group)
    kind, *counts = head.tolist()  # the one place where a step waits for its device
    if masked and kind == _NOTHING:
        raise InputError(
            "Expected data on every pipeline stage, as --reset-attention-mask is on, found none "
            "on this one. Let the datasets provider build its datasets on every rank."
        )
    sampled = kind == _TRAJECTORY
    places = loss_places(floats[:, 0], counts)
    return [
        _batch(ints[n], floats[n], masks[n].bool() if masked else None, places[n], sampled)
        for n in range(count)
    ]


def loss_places(weights_NBS: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Where the labels with a loss are: ``Batch.loss_at`` of N micro-batches.

    Args:
        weights_NBS: [N, B, S].
        counts: [N] how many labels have a loss; the device is not asked for it.

    Returns:
        N times [T] int64.
    """
    carries = (weights_NBS != 0).flatten(1)
    places = carries.flatten().nonzero_static(size=sum(counts))[:, 0]
    return list((places % max(carries.shape[1], 1)).split(list(counts)))


def _batch(
    ints: Tensor, floats: Tensor, mask: Tensor | None, loss_at: Tensor, sampled: bool
) -> Batch:
    tokens, labels, position_ids, written, places, ids = ints
    weights, logprobs = floats
    return Batch(
        tokens=tokens,
        labels=labels,
        position_ids=position_ids,
        loss_weights=weights,
        teacher_written=written.bool(),
        rollout_logprobs=logprobs,
        response_positions=places,
        sample_ids=ids[:, 0],
        attention_mask=mask,
        loss_at=loss_at,
        sampled=sampled,
    )


def _fill(
    items: Sequence[Mapping[str, Tensor]], ints: Tensor, floats: Tensor, masks: Tensor, kind: int
) -> None:
    for n, item in enumerate(items):
        _check(item, kind, tuple(ints.shape[2:]), needs_mask=bool(masks.numel()))
        for i, name in enumerate(("tokens", "labels", "position_ids")):
            ints[n, i] = item[name]
        if kind == _TRAJECTORY:
            ints[n, 3] = item["teacher_written"]
            ints[n, 4] = item["response_positions"]
            ints[n, 5] = item["sample_id"].unsqueeze(1)
            floats[n, 0], floats[n, 1] = item["loss_weights"], item["rollout_logprobs"]
        else:
            floats[n, 0] = item["loss_mask"]
        if masks.numel():
            masks[n] = item["attention_mask"]


def _kind(items: Sequence[Mapping[str, Any]]) -> int:
    if not items:
        return _NOTHING
    return _TRAJECTORY if "loss_weights" in items[0] else _TEXT


def _check(
    item: Mapping[str, Tensor], kind: int, shape: tuple[int, ...], *, needs_mask: bool
) -> None:
    expected = TRAJECTORY if kind == _TRAJECTORY else TEXT
    if missing := [name for name in expected if name not in item]:
        raise InputError(
            f"Expected items with {', '.join(TEXT)} (Megatron's GPT datasets) or with "
            f"{', '.join(TRAJECTORY)} (recorded trajectories), found {', '.join(item)}: "
            f"{', '.join(missing)} missing. Use one of these datasets."
        )
    if unknown := [name for name in item if name not in expected and name not in _BESIDE]:
        raise InputError(
            f"Expected items of {', '.join(expected)}, found {', '.join(unknown)} besides, which "
            "the plug-in would drop unused (cu_seqlens: the rows would be taken for one sequence "
            "each). Leave them out of the items, or use another dataset."
        )
    if needs_mask and "attention_mask" not in item:
        raise InputError(
            "Expected attention_mask in every item, as --reset-attention-mask is on, found "
            f"{', '.join(item)}. Let the dataset make it (not "
            "--no-create-attention-mask-in-dataloader) or drop --reset-attention-mask."
        )
    found = tuple(item["tokens"].shape)
    if found != shape:
        raise InputError(
            f"Expected micro-batches of {list(shape)} tokens (--micro-batch-size x --seq-length), "
            f"found {list(found)}. Give the dataset the same sequence length."
        )
