"""Ranks that stand still: found by their peers, named, with stacks; real processes and signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.base.progress import Progress, limits
from megatron_tropd.launch.watchdog import Beat, Watchdog, _suspects, read_beats

RANK = """
import sys, time
from pathlib import Path
from megatron_tropd.launch import watchdog
from megatron_tropd.base.progress import Progress
from megatron_tropd.launch.watchdog import Watchdog
read_beats = watchdog.read_beats
watchdog.read_beats = lambda *where: (print("reads all heartbeats"), read_beats(*where))[1]
folder, rank, behaviour = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def spin():
    while True:
        pass
(folder / f"ready_{rank}").touch()
while len(list(folder.glob("ready_*"))) < int(sys.argv[4]):
    time.sleep(0.01)  # on a busy machine one starts seconds after the other
progress = Progress()
dog = Watchdog(progress, folder=folder / "beats", failure=folder / "failure.json", rank=rank,
    world_size=3, timeout_minutes=0.03, say=lambda text: print("said:", text))
with dog:
    progress.step = 4
    for phase in range(8) if behaviour == "work" else ():
        progress.enter("rollout")
        time.sleep(0.5)
    if behaviour == "work":
        sys.exit()
    progress.enter("student" if behaviour == "spin" else "optimizer")
    spin() if behaviour == "spin" else time.sleep(600)
"""


def _run(folder: Path, behaviours: list[str]) -> list[tuple[int | None, str]]:
    """(exit code, output) of three ranks; a stopped one is stopped after its first heartbeat."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), behaviour, str(len(behaviours))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    try:
        for rank, behaviour in zip(ranks, behaviours, strict=True):
            while behaviour == "stop" and not _in_the_optimizer(folder / "beats"):
                time.sleep(0.02)
            if behaviour == "stop":
                os.kill(rank.pid, signal.SIGSTOP)
        return [
            (None, "") if behaviour == "stop" else (rank.wait(300), rank.stdout.read())
            for rank, behaviour in zip(ranks, behaviours, strict=True)
        ]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def _in_the_optimizer(beats: Path) -> bool:
    return [beat.phase for beat in read_beats(beats, range(3)).values()] == ["optimizer"] * 3


STOPPED = r"Stopped or gone: rank 1 \(.*no sign of life, last seen in 'optimizer' of step 5"
LOOPING = r"Elsewhere than most: rank 1 \(.*now in 'student' of step 5 at .* spin"


@pytest.mark.parametrize(
    ("behaviour", "words", "phase"),
    [("stop", STOPPED, "optimizer"), ("spin", LOOPING, "student")],
)
def test_the_rank_that_stands_still_is_named(tmp_path, behaviour, words, phase):
    ended = _run(tmp_path, ["wait", behaviour, "wait"])
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["kind"], failure["rank"], failure["exit_code"]) == ("hung", 1, 75)
    assert (failure["step"], failure["phase"]) == (5, phase)
    assert re.search(words, failure["message"]), failure["message"]
    for code, text in ended:
        if code is not None:
            assert code == 75 and "most recent call first" in text
    assert sum(text.count("reads all heartbeats") for _, text in ended) == 2, "one rank, twice"
    if behaviour == "spin":
        assert "in spin" in ended[1][1]


def test_a_job_that_was_suspended_goes_on(tmp_path):
    command = [sys.executable, "-c", RANK, str(tmp_path), "0", "work", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as rank:
        while not (tmp_path / "beats" / "rank_00000.json").exists():
            time.sleep(0.02)
        rank.send_signal(signal.SIGSTOP)
        time.sleep(3.0)  # longer than a phase may last
        rank.send_signal(signal.SIGCONT)
        assert rank.wait(300) == 0
    assert not (tmp_path / "failure.json").exists()


def _beat(rank: int, **changes: object) -> Beat:
    waiting = "torch/distributed/distributed_c10d.py:1 all_reduce"
    beat = Beat(beat=7, rank=rank, node="a", pid=1, step=3, phase="student", at=waiting)
    return replace(beat, **changes)


def test_suspicion():
    same = {rank: _beat(rank) for rank in range(4)}
    assert _suspects(same, []) == ("", [])
    assert _suspects(same, [2])[1] == [2]
    assert _suspects(same | {3: _beat(3, at="train.py:1 loop")}, [])[1] == [3]
    assert _suspects(same | {1: _beat(1, step=2)}, [])[1] == [1]


def test_limits_leave_the_report_time_before_collectives_give_up():
    """In any phase, the start included, which has the longest; its own end comes last."""
    for minutes in (0.1, 30.0, 600.0):
        phase, start, collectives = limits(minutes)
        assert phase == 60 * minutes < start
        period = min(10.0, phase / 10)
        assert collectives > start + period + 60 + 10 * period


def test_a_phase_ends_where_the_one_around_it_goes_on():
    progress = Progress()
    assert progress.enter("evaluation") == "start"
    assert progress.enter("rollout") == "evaluation"
    assert (progress.phase, progress.entered) == ("rollout", 2)


def test_a_rank_that_goes_on_while_it_is_looked_at_was_only_slow(tmp_path, monkeypatch):
    progress = Progress()
    watchdog = Watchdog(
        progress,
        folder=tmp_path,
        failure=tmp_path / "failure.json",
        rank=0,
        world_size=1,
        timeout_minutes=1.0,
        say=pytest.fail,
    )
    monkeypatch.setattr(time, "sleep", lambda _: progress.enter("student"))
    watchdog._report(61.0)
    assert not (tmp_path / "failure.json").exists()
