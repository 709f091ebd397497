"""A rehearsal as a table for a person, or as JSON."""

import textwrap
from collections import Counter
from typing import Any

from megatron_tropd.config import ParallelConfig
from megatron_tropd.planning.estimate import layout_name
from megatron_tropd.planning.report import WIDTH, aligned
from megatron_tropd.rehearsal.processes import Rehearsal
from megatron_tropd.rehearsal.record import PhaseBytes, RankReport

SCHEMA = 1
"""Of the JSON object; raised where a key changes its meaning or goes away."""
LARGEST_DIFFERENCE = 0.1
"""Share of the plan by which a peak may differ from it before that is a finding."""
_WAITS = 12
"""Lines shown that wait most often."""


def findings(rehearsal: Rehearsal) -> list[str]:
    """Peaks that differ from the plan's by more than a tenth."""
    found = []
    for rank in rehearsal.ranks:
        for phase in rank.phases:
            difference = phase.difference
            if difference is None or abs(difference) <= LARGEST_DIFFERENCE:
                continue
            assert phase.planned is not None
            line, size = phase.makers[0]
            found.append(
                f"Stage {rank.stage}, {phase.name}: the rehearsal needs {phase.peak / 1e9:.2f} GB, "
                f"{100 * abs(difference):.0f} % {'more' if difference > 0 else 'less'} than the "
                f"plan's {phase.planned / 1e9:.2f} GB. Most of it was made at {line} "
                f"({size / 1e9:.2f} GB)."
            )
    return found


def rehearsal_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """Everything as plain values; bytes and seconds. docs/planning.md lists the keys."""
    return {
        "schema": SCHEMA,
        "layout": layout_name(rehearsal.planned),
        "findings": findings(rehearsal),
        "ranks": [
            rank.values()
            | {"phases": [vars(phase) | {"difference": phase.difference} for phase in rank.phases]}
            for rank in rehearsal.ranks
        ],
    }


def rehearsal_table(rehearsal: Rehearsal) -> str:
    """Aligned lines for a terminal."""
    blocks = [
        "rehearsed, not run: every operation of one step at its real size, nothing computed",
        _heading(rehearsal),
        _memory(rehearsal.ranks),
        *(_findings(rehearsal)),
        *(_of_rank(rank, rehearsal.planned.parallel) for rank in rehearsal.ranks),
    ]
    return "\n\n".join(blocks)


def _heading(rehearsal: Rehearsal) -> str:
    planned, ranks = rehearsal.planned, rehearsal.ranks
    one = ranks[0]
    step = (
        f"prompt {planned.work.prompt}, response {planned.work.longest_response} tokens; "
        f"{one.run_micro_batches} of {one.micro_batches} micro-batches were run, counts are of all"
    )
    return "\n".join(
        [
            *_wrapped("layout", layout_name(planned)),
            *_wrapped("step", step),
            *_wrapped("layers", "Megatron-Core's own, and what the plan says of those"),
        ]
    )


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * 9
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<9}", subsequent_indent=indent)


def _memory(ranks: list[RankReport]) -> str:
    rows = [["peak GB of a GPU, plan beside it"]]
    for rank in ranks:
        rows[0] += [f"rank {rank.rank}", "plan", ""]
    names = list(dict.fromkeys(phase.name for rank in ranks for phase in rank.phases))
    for name in names:
        row = [f"  {name}"]
        for rank in ranks:
            phase = next((one for one in rank.phases if one.name == name), None)
            row += ["", "", ""] if phase is None else _cells(phase)
        rows.append(row)
    return aligned(rows, gap=2)


def _cells(phase: PhaseBytes) -> list[str]:
    peak = f"{phase.peak / 1e9:.2f}"
    if phase.planned is None or phase.difference is None:
        return [peak, "-", ""]
    return [peak, f"{phase.planned / 1e9:.2f}", f"{100 * phase.difference:+.0f} %"]


def _findings(rehearsal: Rehearsal) -> list[str]:
    lines = [textwrap.fill(f"FINDING: {text}", WIDTH) for text in findings(rehearsal)]
    return ["\n".join(lines)] if lines else []


def _of_rank(rank: RankReport, parallel: ParallelConfig) -> str:
    place = {"stage": rank.stage, "tensor": rank.tensor_rank, "data": rank.data_rank}
    if parallel.context > 1:
        place["context"] = rank.context_rank
    title = (
        f"rank {rank.rank} ({', '.join(f'{axis} {number}' for axis, number in place.items())}): "
        f"rehearsed in {rank.seconds:.0f} s ({rank.cpu_seconds:.0f} s of a core) with "
        f"{rank.resident_bytes / 2**30:.1f} GiB"
    )
    sent = f"  checkpoint: writes {rank.checkpoint_bytes / 1e9:.2f} GB"
    if rank.engine_bytes:
        sent += f"; {rank.engine_bytes / 1e9:.2f} GB of new weights reach it for an engine"
        if rank.engine_buffers:
            sent += f", its own, in {rank.engine_buffers} buffers"
    return "\n".join([title, sent, _collectives(rank), _waits(rank)])


def _collectives(rank: RankReport) -> str:
    rows = [["  collectives", "group", "ranks", "calls", "GB"]]
    calls: Counter[tuple[str, str, str, int]] = Counter()
    sizes: Counter[tuple[str, str, str, int]] = Counter()
    for one in rank.collectives:
        key = (one.phase, one.what, one.group, one.size)
        calls[key] += one.count
        sizes[key] += one.count * one.bytes
    for key, count in calls.items():
        phase, what, group, size = key
        rows.append([f"    {phase}: {what}", group, str(size), str(count), _gb(sizes[key])])
    return aligned(rows, left=2, gap=2)


def _waits(rank: RankReport) -> str:
    waits = sorted(rank.waits, key=lambda one: -one.count)
    total = sum(one.count for one in waits)
    rows = [["  the host waits for the device", "", f"{total}"]]
    rows += [[f"    {one.phase}: {one.what}", one.line, str(one.count)] for one in waits[:_WAITS]]
    if others := waits[_WAITS:]:
        rows.append([f"    {len(others)} other lines", "", str(sum(o.count for o in others))])
    return aligned(rows, left=2, gap=2)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.0e}"
