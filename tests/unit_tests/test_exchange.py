"""Every hidden state reaches the rank that computes its loss, and nobody gets another's.

The ranks of two layouts of one world, one after the other in this process: what each would send is
a number that says which token it is of.
"""

from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config import ParallelConfig
from megatron_tropd.data.dealing import BatchRows
from megatron_tropd.data.packing import dealt, packed
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.mcore import exchange
from megatron_tropd.mcore.exchange import (
    Exchange,
    Wanted,
    plan_exchange,
    receive_from_others,
    send_to_others,
    written_batch,
)
from megatron_tropd.mcore.layout import Layout, layout_of

STUDENTS = {
    "tp2 dp4": ParallelConfig(tensor=2, data=4),
    "cp2 pp2 dp2": ParallelConfig(context=2, pipeline=2, data=2),
    "tp2 cp4 sp": ParallelConfig(tensor=2, context=4, sequence_parallel=True),
    "dp8": ParallelConfig(data=8),
}
TEACHERS = {
    "dp8": ParallelConfig(data=8),
    "tp8": ParallelConfig(tensor=8),
    "pp8": ParallelConfig(pipeline=8),
    "tp2 pp2 dp2": ParallelConfig(tensor=2, pipeline=2, data=2),
    "cp4 tp2": ParallelConfig(context=4, tensor=2),
    "cp2 pp2 tp2 sp": ParallelConfig(context=2, pipeline=2, tensor=2, sequence_parallel=True),
    "ep4": ParallelConfig(data=8, expert=4),
}


def _layout(parallel: ParallelConfig, rank: int) -> Layout:
    return layout_of(parallel, rank=rank, pad_multiple=parallel.row_shards)


def _sequences(count: int) -> list[TokenSequence]:
    """Two turns, a tool's text between them, some tokens without a loss."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        first, tool, second = draw.integers(1, 40, 3)
        ids = [np.arange(n) + 1000 * number for n in (5, first, tool, second)]
        writers = (Writer.CONTEXT, Writer.STUDENT, Writer.CONTEXT, Writer.STUDENT)
        sequence = TokenSequence.of_runs(
            SampleKey(0, number, 0),
            *zip(writers, ids, strict=True),
            logprobs=[-1.0] * int(first + second),
        )
        # Number and position, in one.
        sequence = sequence.replace(ids_N=1000 * number + np.arange(len(sequence)))
        if number % 3 == 0:
            weight_N = sequence.weight_N.copy()
            weight_N[::4] = 0
            sequence = sequence.replace(weight_N=weight_N)
        made.append(sequence)
    return made


def _dealt(sequences: list[TokenSequence], layout: Layout) -> Any:
    return dealt(
        sequences,
        dp_size=layout.dp_size,
        tokens_per_micro_batch=256,
        pad_multiple=layout.pad_multiple,
    ).replicas


def _packed(sequences: list[TokenSequence], layout: Layout) -> list[Any]:
    return packed(sequences, _dealt(sequences, layout)[layout.dp_rank], seed=0, step=0)


def _wants(sequences: list[TokenSequence], layouts: list[Layout]) -> list[Wanted]:
    return [Wanted(_dealt(sequences, x)[x.dp_rank]) for x in layouts]


def _delivered(plans: list[Exchange], number: int) -> list[torch.Tensor]:
    """What arrives at each rank in a round."""
    parts = []
    for plan in plans:
        start = number * plan.per_round
        batches = plan.batches[start : start + plan.per_round]
        nothing = torch.zeros(0, dtype=torch.int64)
        states = torch.cat([nothing, *(b.of_loss_tokens(b.tokens) for b in batches)])
        sent = states[torch.from_numpy(plan.rounds[number].send)]
        bounds = accumulate(plan.rounds[number].counts_out, initial=0)
        parts.append([sent[a:b] for a, b in pairwise(bounds)])
    for receiver, plan in enumerate(plans):
        found = [len(part[receiver]) for part in parts]
        assert found == plan.rounds[number].counts_in
    return [torch.cat([part[rank] for part in parts]) for rank in range(len(plans))]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_state_reaches_the_loss_that_reads_it(student: str, teacher: str, monkeypatch: Any):
    sequences = _sequences(24)
    students = [_layout(STUDENTS[student], rank) for rank in range(8)]
    scorers = [_layout(TEACHERS[teacher], rank) for rank in range(8)]
    wanted = [[x.local(b) for b in _packed(sequences, x)] for x in students]
    batches = [_packed(sequences, x) for x in scorers]
    wants = _wants(sequences, students)
    monkeypatch.setattr(exchange, "_told", lambda mine: wants)
    plans = []
    for rank in range(8):
        assert Wanted.of(wanted[rank], shares=students[rank].cp_size) == wants[rank]
        plans.append(
            plan_exchange(
                _dealt(sequences, scorers[rank]),
                batches[rank],
                wanted[rank],
                dict(enumerate(sequences)),
                scorer=scorers[rank],
                student=students[rank],
            )
        )
    _check(plans, students, wanted)


def _check(plans: list[Exchange], students: list[Layout], wanted: list[list[Any]]) -> None:
    """The student's ranks, the first ones, have what they want."""
    found = [[torch.zeros(n, dtype=torch.int64) - 1 for n in plan.expected] for plan in plans]
    for number in range(len(plans[0].rounds)):
        for rank, arrived in enumerate(_delivered(plans, number)):
            for target, which, places in plans[rank].rounds[number].arrivals:
                found[rank][target][torch.from_numpy(places)] = arrived[torch.from_numpy(which)]
    for rank, layout in enumerate(students):
        assert len(found[rank]) == (len(wanted[rank]) if layout.is_last_stage else 0)
        for states, batch in zip(found[rank], wanted[rank], strict=False):
            taken = exchange._of_loss_tokens(states[:, None], batch)[:, 0]
            assert torch.equal(taken, batch.of_loss_tokens(batch.tokens))


@pytest.mark.parametrize("teacher", ["tp8", "tp2 pp2 dp2", "cp4 tp2", "cp2 pp2 tp2 sp", "ep4"])
@pytest.mark.parametrize("student", ["tp2 cp4 sp", "cp2 pp2 dp2", "three"])
def test_every_state_reaches_it_from_other_ranks(student: str, teacher: str):
    """The scorer's ranks come after the student's; a step is scored in two parts."""
    own, theirs = TEACHERS[teacher], (STUDENTS | {"three": ParallelConfig(data=3)})[student]
    sequences = _sequences(24)
    students = [_layout(theirs, rank) for rank in range(theirs.world_size)]
    scorers = [_layout(own, rank) for rank in range(own.world_size)]
    wanted = [[x.local(b) for b in _packed(sequences, x)] for x in students]
    wants, size = _wants(sequences, students), len(students) + len(scorers)
    halves = [sequences[:16], sequences[16:]]
    dealt_both: list[list[BatchRows]] = [[] for _ in range(scorers[0].dp_size)]
    for start, half in zip((0, 16), halves, strict=True):
        for batches, more in zip(dealt_both, _dealt(half, scorers[0]), strict=True):
            batches += [b._replace(rows=tuple(start + row for row in b.rows)) for b in more]
    plans = []
    for rank in range(size):
        group: Any = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size)
        alike: Any = dict(scorer=scorers[0], student=students[0], group=group)
        known = dict(enumerate(sequences))
        if rank < len(students):
            alike["student"] = students[rank]
            plans.append(receive_from_others(dealt_both, wants, known, **alike))
            continue
        alike["scorer"] = scorer = scorers[rank - len(students)]
        made = [b for half in halves for b in _packed(half, scorer)]
        local = [written_batch(scorer.local(batch)) for batch in made]
        plans.append(send_to_others(dealt_both, local, wants, known, **alike))
        for mine in plans[-1].rounds:
            assert not any(mine.counts_in) and not any(mine.counts_out[len(students) :])
    _check(plans, students, wanted)


def test_work_is_shared_by_the_ranks_that_hold_the_same():
    """Nobody sends what the receiver has, and no rank sends for all of its group."""
    students = [_layout(STUDENTS["dp8"], rank) for rank in range(8)]
    scorers = [_layout(TEACHERS["tp8"], rank) for rank in range(8)]
    sequences = _sequences(24)
    written = {n: exchange.written_positions(s) for n, s in enumerate(sequences)}
    wants = _wants(sequences, students)
    offers = _dealt(sequences, scorers[0])
    for t in exchange._transfers(offers, wants, written, scorers[0], students[0]):
        assert t.sender == t.receiver
    few = _layout(ParallelConfig(tensor=4, pipeline=2), 0)
    wants = _wants(sequences, [_layout(ParallelConfig(tensor=4, pipeline=2), r) for r in range(8)])
    pipe = _layout(TEACHERS["tp2 pp2 dp2"], 0)
    found = list(exchange._transfers(_dealt(sequences, pipe), wants, written, pipe, few))
    assert {t.receiver for t in found} == {4, 5, 6, 7}
    assert {t.sender for t in found} == {4, 5, 6, 7}
