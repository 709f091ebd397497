"""From per-token values of the loss to the numbers of one step (METRICS of docs/metrics.md).

Each last-stage rank adds up its micro-batches into one vector; one SUM, one MAX and one MIN
all-reduce make the global numbers. T = loss tokens of a micro-batch, U = those of the student.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.mixing import Tasks
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.samples import BLEND, EPISODE_FIELD
from megatron_tropd.data.sequence import TokenSequence, Writer
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
    "tokens_golden",
    "golden_nll",
)
GROUP_MEANS = ("k1", "reverse_kl", "forward_kl", "tv", "outlier_share", "teacher_entropy")
"""Those of the means that are also taken over the tokens of each teacher and each task."""
_OF_GROUP = ("tokens", "tokens_student", *GROUP_MEANS)
POSITION_BUCKETS = 18
"""Response positions 0-7, 8-15, 16-31, 32-63, ... up to 2**20."""
_NOTHING = 2**62
_POSITION_BITS = 32
_LARGEST_KEY = 2**63 - 1


@dataclass(frozen=True)
class BadToken:
    """The first token whose loss is no number."""

    row: int
    """Index of its sequence in the step's list."""
    position: int
    """Index within prefix + response."""
    finding: int
    """What is wrong, in the numbers of ``losses.trouble``."""


@dataclass(frozen=True)
class RowGroups:
    """Sequences of a step told apart, by teacher or by task, if there are several."""

    kind: str
    """"teacher" or "task", as metrics begin."""
    names: tuple[str, ...]
    of_row: tuple[int, ...]
    """Number of each sequence's group."""


def groups_of(
    routes: Routes | None, tasks: Tasks | None, sequences: Sequence[TokenSequence]
) -> list[RowGroups]:
    """Tell a step's sequences apart by teacher and by task, as far as there are several."""
    groups = []
    if routes is not None and len(routes.names) > 1:
        groups.append(RowGroups("teacher", routes.names, tuple(routes.teachers_of(sequences))))
    if tasks is not None:
        groups.append(RowGroups("task", tasks.names, tuple(tasks.of(sequences))))
    return groups


@dataclass
class StepSums:
    """Sums over this rank's loss tokens, to be reduced over the world."""

    sums: Tensor
    """float64 [scalars + 2 x buckets + groups x 8]: scalars, acceptance by position, counts by
    position, and of each teacher and task ``_OF_GROUP``."""
    gap_max: Tensor
    """float64 [1] largest |trainer - engine| log-prob."""
    bad_token: Tensor
    """int64 [1] sequence, position and finding of the first token whose loss is no number, in
    one number; 2**62 if there is none."""
    groups: Sequence[RowGroups] = ()
    """Of the sequences."""

    @classmethod
    def zeros(cls, device: torch.device, groups: Sequence[RowGroups] = ()) -> "StepSums":
        """Nothing counted yet."""
        of_groups = sum(len(each.names) for each in groups) * len(_OF_GROUP)
        size = len(_SCALARS) + 2 * POSITION_BUCKETS + of_groups
        return cls(
            torch.zeros(size, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
            torch.full((1,), _NOTHING, dtype=torch.int64, device=device),
            groups,
        )

    def add(self, loss_T: Tensor, values: dict[str, Tensor], batch: MicroBatch) -> None:
        """Count one micro-batch.

        Args:
            loss_T: [T] weighted loss per token.
            values: [T] each, from the loss.
            batch: whose ``loss_at`` says which tokens the T are.
        """
        student = batch.student_at

        def of_student(values_T: Tensor) -> Tensor:
            return values_T.index_select(0, student)

        golden_T = (batch.of_loss_tokens(batch.writers) == Writer.GOLDEN).double()
        nll_T = torch.where(golden_T > 0, -values["student_logprob"].double(), 0.0)
        engine_T = batch.of_loss_tokens(batch.engine_logprobs)
        gap_U = of_student(values["student_logprob"] - engine_T).double()
        absent = torch.full_like(loss_T, math.nan)
        scalars = {
            "loss": loss_T.double().sum(),
            "tokens_teacher": self.sums.new_full((), len(loss_T) - len(student)) - golden_T.sum(),
            "tokens_student": self.sums.new_full((), len(student)),
            "engine_gap_mean": gap_U.abs().sum(),
            "engine_ratio_mean": gap_U.exp().sum(),
            "tokens_golden": golden_T.sum(),
            "golden_nll": nll_T.sum(),
        }
        for metric, key in STUDENT_MEANS.items():
            scalars[metric] = of_student(values.get(key, absent)).double().sum()
        buckets_U = _buckets(of_student(batch.of_loss_tokens(batch.response_positions)))
        by_position = self.sums.new_zeros(2, POSITION_BUCKETS)
        by_position[0].index_add_(0, buckets_U, of_student(values["trust"]).double())
        by_position[1].index_add_(0, buckets_U, torch.ones_like(gap_U))
        parts = [torch.stack([scalars[name] for name in _SCALARS]), by_position.flatten()]
        parts += [_of_groups(each, values, batch).flatten() for each in self.groups]
        self.sums += torch.cat(parts)
        if gap_U.numel():
            self.gap_max = torch.maximum(self.gap_max, gap_U.abs().max()[None])
        self._note_trouble(trouble(values | {"loss": loss_T}), batch)

    def _note_trouble(self, found_T: Tensor, batch: MicroBatch) -> None:
        """Remember the first bad token, on its device: nobody waits for it here."""
        positions_T = batch.of_loss_tokens(batch.response_positions)
        key_T = (batch.loss_rows << _POSITION_BITS) | (positions_T << BITS) | found_T
        key_T = torch.where(found_T > 0, key_T, _NOTHING)
        self.bad_token = torch.cat([self.bad_token, key_T]).amin(dim=0, keepdim=True)

    def reduce(self) -> "StepTotals":
        """Sums of the whole world, equal on every rank; the one place where a step waits for them.

        Collectives: all-reduces of [scalars + 2 x buckets], [1] and [1].
        """
        dist.all_reduce(self.sums)
        dist.all_reduce(self.gap_max, dist.ReduceOp.MAX)
        dist.all_reduce(self.bad_token, dist.ReduceOp.MIN)
        *sums, gap_max = torch.cat([self.sums, self.gap_max]).tolist()
        names = [f"{each.kind}/{name}" for each in self.groups for name in each.names]
        return StepTotals(sums, gap_max, int(self.bad_token), tuple(names))


@dataclass(frozen=True)
class StepTotals:
    """:class:`StepSums` of the whole world, as numbers of the host."""

    sums: list[float]
    gap_max: float
    bad_token: int
    groups: tuple[str, ...] = ()
    """Of several teachers and tasks, as metrics begin: "teacher/NAME"."""

    @property
    def first_bad_token(self) -> BadToken | None:
        """The first token whose loss is not finite, the same everywhere."""
        if self.bad_token == _NOTHING:
            return None
        position = (self.bad_token & ((1 << _POSITION_BITS) - 1)) >> BITS
        finding = self.bad_token & ((1 << BITS) - 1)
        return BadToken(self.bad_token >> _POSITION_BITS, position, finding)

    def metrics(self) -> dict[str, Any]:
        """Means and counts of the step; null where nothing was counted."""
        scalars = dict(zip(_SCALARS, self.sums, strict=False))
        teacher, student = scalars.pop("tokens_teacher"), scalars.pop("tokens_student")
        golden, nll = scalars.pop("tokens_golden"), scalars.pop("golden_nll")
        loss = scalars.pop("loss")
        of_golden = {"tokens_golden": int(golden), "golden_nll": nll / golden} if golden else {}
        means = {name: _ratio(value, student) for name, value in scalars.items()}
        rest = self.sums[len(_SCALARS) :]
        accepted, counts = rest[:POSITION_BUCKETS], rest[POSITION_BUCKETS : 2 * POSITION_BUCKETS]
        filled = [i for i, count in enumerate(counts) if count]
        by_position = [_ratio(a, c) for a, c in zip(accepted, counts, strict=True)]
        return {
            "loss": _ratio(loss, teacher + student + golden),
            "tokens_student": int(student),
            "tokens_teacher": int(teacher),
            **of_golden,
            **means,
            "engine_gap_max": self.gap_max,
            "acceptance_by_position": by_position[: max(filled, default=-1) + 1],
            **self._by_group(rest[2 * POSITION_BUCKETS :], teacher + student + golden),
        }

    def _by_group(self, sums: Sequence[float], total: float) -> dict[str, Any]:
        """``teacher/NAME/...``, ``task/NAME/...``: one to which no token came shows, too."""
        found: dict[str, Any] = {}
        for number, name in enumerate(self.groups):
            size = len(_OF_GROUP)
            mine = dict(zip(_OF_GROUP, sums[number * size :][:size], strict=True))
            tokens, student = mine.pop("tokens"), mine.pop("tokens_student")
            found[f"{name}/tokens"] = int(tokens)
            found[f"{name}/token_share"] = _ratio(tokens, total)
            found |= {f"{name}/{key}": _ratio(v, student) for key, v in mine.items()}
        return found


def _of_groups(groups: RowGroups, values: dict[str, Tensor], batch: MicroBatch) -> Tensor:
    """[groups, 8] float64 sums of ``_OF_GROUP`` over a micro-batch."""
    table = upload(torch.tensor(groups.of_row), batch.loss_rows.device)
    group_T = table[batch.loss_rows]
    student_T = torch.zeros_like(group_T, dtype=torch.float64)
    student_T.index_fill_(0, batch.student_at, 1.0)
    absent = torch.full_like(student_T, math.nan)
    of_student = [
        torch.where(student_T > 0, values.get(STUDENT_MEANS[name], absent).double(), 0.0)
        for name in GROUP_MEANS
    ]
    columns = torch.stack([torch.ones_like(student_T), student_T, *of_student], dim=1)
    return columns.new_zeros(len(groups.names), columns.shape[1]).index_add_(0, group_T, columns)


def sequence_metrics(
    sequences: Sequence[TokenSequence], *, step: int, tasks: Tasks | None = None
) -> dict[str, Any]:
    """What the token ids alone tell: lengths, cut-off share, repetition, prefixes, staleness.

    Golden answers, which nobody sampled, are left out.

    Args:
        tasks: several, of each of which lengths are told, too.
    """
    sequences = [t for t in sequences if not t.count(Writer.GOLDEN)]
    lengths = [len(t) - t.prompt_length for t in sequences]
    prefixes = [t.count(Writer.TEACHER) for t in sequences]
    total = max(sum(lengths), 1)
    count = len(sequences)
    return {
        "response_length": sum(lengths) / count,
        "truncated_share": sum(t.finish == "length" for t in sequences) / count,
        "repetition_share": sum(repetition(t.by(Writer.STUDENT)) for t in sequences) / count,
        "prefix_share": sum(prefixes) / total,
        "prefix_longest": float(max(prefixes)),
        "staleness": sum(step - t.oldest_version for t in sequences) / count,
        **_blend_metrics(sequences),
        **_task_metrics(sequences, tasks),
        **_episode_metrics(sequences),
    }


def _task_metrics(sequences: Sequence[TokenSequence], tasks: Tasks | None) -> dict[str, Any]:
    """Number, length and cut-off share of each task's sequences."""
    found: dict[str, Any] = {}
    numbers = [] if tasks is None else tasks.of(sequences)
    for number, name in enumerate(tasks.names if tasks else ()):
        mine = [s for s, task in zip(sequences, numbers, strict=True) if task == number]
        lengths = float(sum(len(s) - s.prompt_length for s in mine))
        cut = float(sum(s.finish == "length" for s in mine))
        found[f"task/{name}/sequences"] = len(mine)
        found[f"task/{name}/response_length"] = _ratio(lengths, len(mine))
        found[f"task/{name}/truncated_share"] = _ratio(cut, len(mine))
    return found


def _blend_metrics(sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """Of sequences that were sampled from between student and teacher; none: no metrics."""
    sums = [t.fields[BLEND] for t in sequences if BLEND in t.fields]
    if not sums:
        return {}
    tokens, passes, kl, b = (sum(s[name] for s in sums) for name in ("tokens", "passes", "kl", "b"))
    return {
        "behaviour_kl": kl / tokens,
        "behaviour_teacher_share": b / tokens,
        "tokens_per_teacher_pass": tokens / passes,
    }


def _episode_metrics(sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """Of episodes with an environment: turns, ends, and means of the numbers that it said."""
    said = [t.fields[EPISODE_FIELD] for t in sequences if EPISODE_FIELD in t.fields]
    if not said:
        return {}
    turns, ends = sum(one["turns"] for one in said), [one["end"] for one in said]
    infos = [one["info"] for one in said]
    names = sorted({name for info in infos for name in info})
    context = sum(t.writers.count(Writer.CONTEXT) for t in sequences)
    return {
        "environment/turns": turns / len(said),
        "environment/tokens": context / len(said),
        "environment/drifted_share": sum(one["drifted"] for one in said) / max(turns, 1),
        "environment/failed_share": sum("error" in one for one in said) / len(said),
        **{f"environment/end/{end}": ends.count(end) / len(said) for end in sorted(set(ends))},
        **{
            f"environment/info/{name}": float(np.mean([i[name] for i in infos if name in i]))
            for name in names
        },
    }


def repetition(token_ids: Sequence[int] | NDArray[np.int64], n: int = 4) -> float:
    """Share of the n-grams of a response that already stood in it."""
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    _, ranks = np.unique(np.asarray(token_ids, np.int64), return_inverse=True)
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
