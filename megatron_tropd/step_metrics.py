"""From per-token values of the loss to the numbers of one step (METRICS of docs/metrics.md).

Each last-stage rank adds up its micro-batches into one vector; one SUM, one MAX and one MIN
all-reduce make the global numbers. T = loss tokens of a micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.data.types import MicroBatch, Segment, Trajectory
from megatron_tropd.losses.trouble import BITS, trouble

STUDENT_MEANS = {
    "outlier_share": "outlier",
    "tv": "tv",
    "acceptance": "trust",
    "k1": "k1",
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
    "topk_mass_teacher": "topk_mass_teacher",
    "topk_mass_student": "topk_mass_student",
    "selected_share": "selected",
    "importance_mean": "importance",
    "dropped_share": "dropped",
}
"""Metric -> per-token value of the loss; means over student tokens that carry loss."""

_SCALARS = (
    "loss",
    "tokens_teacher",
    "tokens_student",
    *STUDENT_MEANS,
    "engine_gap_mean",
    "engine_ratio_mean",
)
POSITION_BUCKETS = 18
"""Response positions 0-7, 8-15, 16-31, 32-63, ... up to 2**20."""
_NOTHING = 2**62
_POSITION_BITS = 32
_LARGEST_KEY = 2**63 - 1


@dataclass(frozen=True)
class BadToken:
    """The first token whose loss is no number."""

    row: int
    """Index of its trajectory in the step's list."""
    position: int
    """Index within prefix + response."""
    finding: int
    """What is wrong, in the numbers of ``losses.trouble``."""


@dataclass
class StepSums:
    """Sums over this rank's loss tokens, to be reduced over the world."""

    sums: Tensor
    """float64 [scalars + 2 x buckets]: scalars, acceptance by position, counts by position."""
    gap_max: Tensor
    """float64 [1] largest |trainer - engine| log-prob."""
    bad_token: Tensor
    """int64 [1] trajectory, position and finding of the first token whose loss is no number, in
    one number; 2**62 if there is none. Known after :meth:`reduce`."""
    _bad_rows: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """Of each micro-batch its trajectories and, [B], position and finding of their first one."""

    @classmethod
    def zeros(cls, device: torch.device) -> "StepSums":
        """Nothing counted yet."""
        size = len(_SCALARS) + 2 * POSITION_BUCKETS
        return cls(
            torch.zeros(size, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
            torch.full((1,), _NOTHING, dtype=torch.int64, device=device),
        )

    def add(self, loss_T: Tensor, values: dict[str, Tensor], batch: MicroBatch) -> None:
        """Count one micro-batch.

        Args:
            loss_T: [T] weighted loss per token.
            values: [T] each, from the loss.
            batch: whose ``loss_mask`` selects the T tokens.
        """
        mask = batch.loss_mask
        student_T = batch.segments[mask] == Segment.STUDENT
        gap_T = (values["student_logprob"] - batch.rollout_logprobs[mask])[student_T].double()
        absent = torch.full_like(loss_T, math.nan)
        scalars = {
            "loss": loss_T.double().sum(),
            "tokens_teacher": (~student_T).double().sum(),
            "tokens_student": student_T.double().sum(),
            "engine_gap_mean": gap_T.abs().sum(),
            "engine_ratio_mean": gap_T.exp().sum(),
        }
        for metric, key in STUDENT_MEANS.items():
            scalars[metric] = values.get(key, absent)[student_T].double().sum()
        buckets_T = _buckets(batch.response_positions[mask][student_T])
        by_position = torch.zeros_like(self.sums[len(_SCALARS) :]).view(2, POSITION_BUCKETS)
        by_position[0].index_add_(0, buckets_T, values["trust"][student_T].double())
        by_position[1].index_add_(0, buckets_T, torch.ones_like(gap_T))
        self.sums += torch.cat(
            [torch.stack([scalars[name] for name in _SCALARS]), by_position.flatten()]
        )
        if gap_T.numel():
            self.gap_max = torch.maximum(self.gap_max, gap_T.abs().max()[None])
        self._note_trouble(trouble(values | {"loss": loss_T}), batch)

    def _note_trouble(self, found_T: Tensor, batch: MicroBatch) -> None:
        """Remember the first bad token of each row, on its device: nobody waits for it here."""
        mask = batch.loss_mask
        found_BS = torch.zeros_like(batch.segments).masked_scatter(mask, found_T)
        key_BS = (batch.response_positions << BITS) | found_BS
        first_B = torch.where(found_BS > 0, key_BS, _NOTHING).amin(dim=1)
        self._bad_rows.append((batch.rows, first_B))

    def _first_bad_key(self) -> int:
        """Of this rank; waits for the device."""
        if not self._bad_rows:
            return _NOTHING
        rows = [row for batch_rows, _ in self._bad_rows for row in batch_rows]
        keys = torch.cat([first_B for _, first_B in self._bad_rows]).tolist()
        bad = [(row, key) for row, key in zip(rows, keys, strict=True) if key != _NOTHING]
        return min(((row << _POSITION_BITS) | key for row, key in bad), default=_NOTHING)

    def reduce(self) -> "StepSums":
        """Sums of the whole world, equal on every rank.

        Collectives: all-reduces of [scalars + 2 x buckets], [1] and [1].
        """
        self.bad_token.fill_(self._first_bad_key())
        dist.all_reduce(self.sums)
        dist.all_reduce(self.gap_max, dist.ReduceOp.MAX)
        dist.all_reduce(self.bad_token, dist.ReduceOp.MIN)
        return self

    @property
    def first_bad_token(self) -> BadToken | None:
        """The first token whose loss is not finite (after :meth:`reduce`), the same everywhere."""
        key = int(self.bad_token)
        if key == _NOTHING:
            return None
        position = (key & ((1 << _POSITION_BITS) - 1)) >> BITS
        return BadToken(key >> _POSITION_BITS, position, key & ((1 << BITS) - 1))

    def metrics(self) -> dict[str, Any]:
        """Means and counts of the step (after :meth:`reduce`); null where nothing was counted."""
        scalars = dict(zip(_SCALARS, self.sums[: len(_SCALARS)].tolist(), strict=True))
        teacher, student = scalars.pop("tokens_teacher"), scalars.pop("tokens_student")
        loss = scalars.pop("loss")
        means = {name: _ratio(value, student) for name, value in scalars.items()}
        accepted, counts = self.sums[len(_SCALARS) :].view(2, POSITION_BUCKETS).tolist()
        filled = [i for i, count in enumerate(counts) if count]
        by_position = [_ratio(a, c) for a, c in zip(accepted, counts, strict=True)]
        return {
            "loss": _ratio(loss, teacher + student),
            "tokens_student": int(student),
            "tokens_teacher": int(teacher),
            **means,
            "engine_gap_max": float(self.gap_max),
            "acceptance_by_position": by_position[: max(filled, default=-1) + 1],
        }


def trajectory_metrics(trajectories: Sequence[Trajectory], *, step: int) -> dict[str, float]:
    """What the token ids alone tell: lengths, cut-off share, repetition, prefixes, staleness."""
    lengths = [len(t.prefix_ids) + len(t.response_ids) for t in trajectories]
    total = max(sum(lengths), 1)
    count = len(trajectories)
    return {
        "response_length": sum(lengths) / count,
        "truncated_share": sum(t.finish_reason == "length" for t in trajectories) / count,
        "repetition_share": sum(repetition(t.response_ids) for t in trajectories) / count,
        "prefix_share": sum(len(t.prefix_ids) for t in trajectories) / total,
        "prefix_longest": float(max(len(t.prefix_ids) for t in trajectories)),
        "staleness": sum(step - t.weights_version for t in trajectories) / count,
    }


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a response that already stood in it."""
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    _, ranks = np.unique(np.fromiter(token_ids, np.int64, len(token_ids)), return_inverse=True)
    # One number for each n-gram, made as small as it must be to fit.
    keys, distinct = ranks[:total], int(ranks.max()) + 1
    size = distinct
    for offset in range(1, n):
        if size * distinct > _LARGEST_KEY:
            _, keys = np.unique(keys, return_inverse=True)
            size = total
        keys, size = keys * distinct + ranks[offset : offset + total], size * distinct
    keys.sort()
    return 1 - (1 + np.count_nonzero(keys[1:] != keys[:-1])) / total


def _buckets(positions_T: Tensor) -> Tensor:
    edges = 2 ** torch.arange(3, POSITION_BUCKETS + 2, device=positions_T.device)
    return torch.bucketize(positions_T, edges, right=True)


def _ratio(value: float, count: float) -> float | None:
    return None if not count or math.isnan(value) else value / count
