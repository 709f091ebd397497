"""Every hidden state reaches the rank that computes its loss, and nobody gets another's.

The ranks of two layouts of one world, one after the other in this process: what each would send is
a number that says which token it is of.
"""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tropd.config import ParallelConfig
from megatron_tropd.data.packing import pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.mcore import exchange
from megatron_tropd.mcore.exchange import Dealt, Exchange, plan_exchange
from megatron_tropd.mcore.layout import Layout

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
    rest, tp_rank = divmod(rank, parallel.tensor)
    pp_rank, replica = divmod(rest, parallel.replicas)
    dp_rank, cp_rank = divmod(replica, parallel.context)
    return Layout(
        rank=rank,
        world_size=parallel.world_size,
        tp_rank=tp_rank,
        tp_size=parallel.tensor,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline,
        dp_rank=dp_rank,
        dp_size=parallel.data,
        cp_rank=cp_rank,
        cp_size=parallel.context,
        groups=ProcessGroupCollection(),
        pad_multiple=parallel.row_shards,
    )


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


def _packed(sequences: list[TokenSequence], layout: Layout) -> list[Any]:
    return pack(
        sequences,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
        tokens_per_micro_batch=256,
        pad_multiple=layout.pad_multiple,
        seed=0,
        step=0,
    )


def _delivered(plans: list[Exchange], number: int) -> list[torch.Tensor]:
    """What arrives at each rank in a round."""
    parts = []
    for plan in plans:
        start = number * plan.per_round
        batches = plan.batches[start : start + plan.per_round]
        states = torch.cat([b.of_loss_tokens(b.tokens) for b in batches])
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
    told = {
        "wants": [Dealt.of(w, shares=STUDENTS[student].context) for w in wanted],
        "offers": [Dealt.of(b) for b in batches],
    }
    plans = []
    for rank in range(8):
        answers = iter((told["offers"], told["wants"]))
        monkeypatch.setattr(exchange, "_told", lambda mine, a=answers: next(a))
        plans.append(
            plan_exchange(
                batches[rank],
                wanted[rank],
                dict(enumerate(sequences)),
                scorer=scorers[rank],
                student=students[rank],
            )
        )
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


def test_work_is_shared_by_the_ranks_that_hold_the_same():
    """Nobody sends what the receiver has, and no rank sends for all of its group."""
    students = [_layout(STUDENTS["dp8"], rank) for rank in range(8)]
    scorers = [_layout(TEACHERS["tp8"], rank) for rank in range(8)]
    sequences = _sequences(24)
    written = {n: exchange.written_positions(s) for n, s in enumerate(sequences)}
    offers = [Dealt.of(_packed(sequences, x)) for x in scorers]
    wants = [Dealt.of(_packed(sequences, x)) for x in students]
    for t in exchange._transfers(offers, wants, written, scorers[0], students[0]):
        assert t.sender == t.receiver
    few = replace(students[0], tp_size=4, dp_size=1, pp_size=2)
    wants = [Dealt.of(_packed(sequences, replace(x, dp_rank=0, dp_size=1))) for x in students]
    pipe = [_layout(TEACHERS["tp2 pp2 dp2"], rank) for rank in range(8)]
    offers = [Dealt.of(_packed(sequences, x)) for x in pipe]
    found = list(exchange._transfers(offers, wants, written, pipe[0], few))
    assert {t.receiver for t in found} == {4, 5, 6, 7}
    assert {t.sender for t in found} == {4, 5, 6, 7}
