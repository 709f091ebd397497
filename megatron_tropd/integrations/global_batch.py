"""From what Megatron's data loaders give to micro-batches that are the same on a model's ranks.

Two kinds of items are understood, told apart by their keys: those of Megatron's GPT datasets, and
trajectories (``data.recorded``), which know who wrote a token and how likely it was.

B = rows of a micro-batch, S = sequence length, N = micro-batches of this data-parallel rank.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.data.batch import MicroBatch, micro_batch, upload
from megatron_tropd.data.collective import run_and_share
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.sequence import NO_VERSION, SampleKey, TokenSequence, Writer
from megatron_tropd.losses import Method

if TYPE_CHECKING:
    from megatron_tropd.mcore.layout import Layout

TEXT = ("tokens", "labels", "loss_mask", "position_ids")
"""Keys of a given text: an item of Megatron's GPT datasets."""
_COLUMNS: dict[str, type[np.generic]] = {
    **dict.fromkeys(("tokens", "labels", "position_ids", "writers"), np.int64),
    **dict.fromkeys(("weights", "behaviour_logprobs", "engine_logprobs"), np.float32),
    "response_positions": np.int64,
}
TRAJECTORY = (*_COLUMNS, "sample_key")
"""Keys of a recorded or fresh trajectory."""
_BESIDE = frozenset({"attention_mask", "dataset_id"})
"""What items may hold besides: the mask, used where it is asked for, and where a blend took it."""


@dataclass(frozen=True)
class BatchShare:
    """What every rank knows beforehand of its share of a step's global batch."""

    count: int
    """N."""
    shape: tuple[int, int]
    """(B, S)."""
    step: int
    """0-based; keys the mask draws, beside :attr:`seed`."""
    seed: int
    masked: bool
    """Whether the items' own ``attention_mask`` is to be used."""
    must_be_sampled: bool
    """Whether the loss is for tokens that the student sampled."""
    group: dist.ProcessGroup
    """Tensor-parallel group; its first rank's items are used."""
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1

    def rows(self, n: int) -> range:
        """Places in the global batch of the rows of micro-batch ``n``, as Megatron deals them."""
        start = (n * self.dp_size + self.dp_rank) * self.shape[0]
        return range(start, start + self.shape[0])


def deal(
    items: Sequence[Mapping[str, Tensor]], rows: int, dp_rank: int, dp_size: int
) -> list[dict[str, Tensor]]:
    """Make a replica's micro-batches of a whole global batch, as Megatron's samplers deal it."""
    starts = range(dp_rank * rows, len(items), dp_size * rows)
    return [default_collate(list(items[start : start + rows])) for start in starts]


def own_share(items: Sequence[Mapping[str, Tensor]], share: BatchShare) -> list[dict[str, Tensor]]:
    """Make this replica's micro-batches of as many items as a global batch has."""
    expected = share.count * share.shape[0] * share.dp_size
    if len(items) != expected:
        raise ConfigError(
            f"Expected {expected} items per step of the rollouts (--global-batch-size), found "
            f"{len(items)}. Sample as many."
        )
    return deal(items, share.shape[0], share.dp_rank, share.dp_size)


def draw(iterator: Iterator[Mapping[str, Tensor]] | None, share: BatchShare) -> list[MicroBatch]:
    """Take a global batch's share of this replica from its loader; all its ranks get the same.

    Args:
        iterator: Megatron's. Tensor ranks other than the first may have none, and so may stages
            in the middle of a pipeline; whoever has one advances it.

    Returns:
        N micro-batches of whole rows, on the host; without loss tokens where the stage has no
        data.

    Raises:
        InputError: the data ended; an item lacks keys or has another shape; there are none to take
            masks from.
        ConfigError: the loss is for sampled tokens, and the items are given text.

    Collectives: those of :func:`broadcast_items`.
    """
    try:
        items = [] if iterator is None else [next(iterator) for _ in range(share.count)]
    except StopIteration:
        raise InputError(
            f"Expected {share.count} micro-batches for the next step, found the data at its end. "
            "Give more data, ask for fewer iterations, or, for several epochs, use "
            "--dataloader-type cyclic."
        ) from None
    return broadcast_items(items, share)


def broadcast_items(items: Sequence[Mapping[str, Tensor]], share: BatchShare) -> list[MicroBatch]:
    """Make micro-batches as :func:`draw` does, of N items on the first rank, or of none.

    Collectives: 1 broadcast of the items on ``share.group``, if it has more than one rank.
    """
    told: list[Any] = [None]
    if share.group.rank() == 0 and items:
        try:
            told = [[_columns(item, share, share.rows(n)) for n, item in enumerate(items)]]
        except (ConfigError, InputError) as error:
            told = [error]  # the others would wait for items
    if share.group.size() > 1:
        dist.broadcast_object_list(told, dist.get_global_rank(share.group, 0), group=share.group)
    if isinstance(told[0], Exception):
        raise told[0]
    if told[0] is None and share.masked:
        raise InputError(
            "Expected data on every pipeline stage, as --reset-attention-mask is on, found none "
            "on this one. Let the datasets provider build its datasets on every rank."
        )
    nothing = {name: np.zeros(share.shape, dtype) for name, dtype in _COLUMNS.items()}
    nothing["sample_key"] = np.zeros((share.shape[0], 3), np.int64)
    made = told[0] or [dict(nothing) for _ in range(share.count)]
    return [_micro_batch(columns, share, share.rows(n)) for n, columns in enumerate(made)]


def _micro_batch(columns: dict[str, NDArray[Any]], share: BatchShare, rows: range) -> MicroBatch:
    keys = [SampleKey(*key) for key in columns.pop("sample_key").tolist()]
    mask = columns.pop("attention_mask", None)
    return micro_batch(
        columns,
        keys,
        rows,
        seed=share.seed,
        step=share.step,
        attention_mask=None if mask is None else torch.from_numpy(mask),
    )


def whole_step(batches: Sequence[MicroBatch], layout: "Layout") -> list[TokenSequence]:
    """Tell every rank the sequences of the global batch, in the order of ``MicroBatch.rows``.

    Args:
        batches: whole rows of this replica on the host, as :func:`draw` makes them.
        layout: this rank's place.

    Collectives: those of ``run_and_share``, one owner a replica.
    """
    last = layout.pp_size - 1
    owners = [
        layout.global_rank(tp_rank=0, pp_rank=last, replica=number * layout.cp_size)
        for number in range(layout.dp_size)
    ]
    found: dict[int, tuple[SampleKey, NDArray[Any], NDArray[Any]]] = {}
    for told in run_and_share(lambda: _written(batches) if layout.rank in owners else {}, owners):
        found |= told
    return [_sequence(*found[row]) for row in range(len(found))]


def _written(
    batches: Sequence[MicroBatch],
) -> dict[int, tuple[SampleKey, NDArray[Any], NDArray[Any]]]:
    """Number of a row -> its key, ids and writers, up to the last token that somebody wrote."""
    found = {}
    for batch in batches:
        tokens, labels, writers = (
            values.cpu().numpy() for values in (batch.tokens, batch.labels, batch.writers)
        )
        for place, row in enumerate(batch.rows):
            length = int(np.flatnonzero(writers[place]).max(initial=-1)) + 1
            ids_N = np.concatenate([tokens[place, :1], labels[place, :length]]).astype(np.int32)
            writer_N = np.concatenate([[int(Writer.CONTEXT)], writers[place, :length]])
            found[row] = batch.keys[place], ids_N, writer_N.astype(np.int8)
    return found


def _sequence(key: SampleKey, ids_N: NDArray[Any], writer_N: NDArray[Any]) -> TokenSequence:
    """A sequence of which no more is known than who wrote what."""
    unknown_N = np.full(len(ids_N), np.nan, np.float32)
    return TokenSequence(
        key=key,
        ids_N=ids_N.astype(np.int64),
        writer_N=writer_N.astype(np.int64),
        engine_logprobs_N=unknown_N,
        behaviour_logprobs_N=unknown_N,
        weight_N=(writer_N != Writer.CONTEXT).astype(np.float32),
        version_N=np.full(len(ids_N), NO_VERSION),
        finish="",
    )


def whole_batch(
    batches: Sequence[MicroBatch], loss: Method, group: dist.ProcessGroup, device: torch.device
) -> tuple[LossCounts, list[int]]:
    """Learn what the loss has to know of the other replicas' micro-batches, if anything.

    Returns:
        Loss tokens of the global batch, and the prompt of each of its rows. If the loss asks for
        neither, this replica's tokens and no prompts.

    Collectives: for such a loss 1 all-reduce of [2]; if it looks at the whole batch first, 1 gather
    of its rows' keys.
    """
    student = sum(len(batch.student_at) for batch in batches)
    counts = [sum(len(batch.loss_at) for batch in batches) - student, student]
    if loss.denominator == "separate" or loss.needs_student_pass:
        total = upload(torch.tensor(counts), device)
        dist.all_reduce(total, group=group)
        counts = total.tolist()
    prompts: dict[int, int] = {}
    if loss.needs_student_pass:
        mine = {row: key.prompt for b in batches for row, key in zip(b.rows, b.keys, strict=True)}
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, mine, group=group)
        for part in parts:
            prompts |= part
    return LossCounts(counts[0], counts[1], 0), [prompts[row] for row in range(len(prompts))]


def _columns(item: Mapping[str, Tensor], share: BatchShare, rows: range) -> dict[str, NDArray[Any]]:
    """Take an item as rows of a micro-batch."""
    _check(item, share)
    if "writers" not in item:
        item = {**item, **_as_trajectory(item["loss_mask"], share.step, rows)}
    columns = {name: item[name].numpy().astype(dtype) for name, dtype in _COLUMNS.items()}
    columns["sample_key"] = item["sample_key"].numpy()
    if (columns["writers"] == Writer.GOLDEN).any():
        raise InputError(
            "Expected tokens of context, teacher or student, found golden answers, for which no "
            "method of the plug-in has a loss. Leave their sequences out of the dataset."
        )
    if share.masked:
        columns["attention_mask"] = item["attention_mask"].bool().numpy()
    return columns


def _as_trajectory(loss_mask: Tensor, step: int, rows: range) -> dict[str, Tensor]:
    """What a given text lacks: its tokens count as the student's, but nobody sampled them."""
    nothing = torch.zeros_like(loss_mask)
    return {
        "weights": loss_mask,
        "writers": torch.where(loss_mask != 0, Writer.STUDENT, Writer.CONTEXT),
        "response_positions": nothing,
        "behaviour_logprobs": nothing,
        "engine_logprobs": torch.full_like(loss_mask, math.nan),
        "sample_key": torch.tensor([SampleKey(step, row, 0) for row in rows]),
    }


def _check(item: Mapping[str, Tensor], share: BatchShare) -> None:
    expected = TRAJECTORY if "writers" in item else TEXT
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
    if share.masked and "attention_mask" not in item:
        raise InputError(
            "Expected attention_mask in every item, as --reset-attention-mask is on, found "
            f"{', '.join(item)}. Let the dataset make it (not "
            "--no-create-attention-mask-in-dataloader) or drop --reset-attention-mask."
        )
    found = tuple(item["tokens"].shape)
    if found != share.shape:
        raise InputError(
            f"Expected micro-batches of {list(share.shape)} tokens (--micro-batch-size x "
            f"--seq-length), found {list(found)}. Give the dataset the same sequence length."
        )
    if share.must_be_sampled and expected is TEXT:
        raise ConfigError(
            "This --tropd-method trains on tokens that the student sampled, but the dataset "
            "has given text. Use recorded trajectories, or a method for given text "
            "(gkd_forward_kl, gkd_reverse_kl, gkd_jsd, tropd_exact)."
        )
