"""Notices a rank that stands still: where it is, where the others are, and then the end.

Every rank has a thread that writes a heartbeat file every few seconds (a counter, the step, the
phase, the innermost line of Python) and one that watches how long the phase lasts. Where it is too
long, one rank, whoever is first, reads the others' files twice: whose counter stands still is
stopped or gone, who is in another phase is behind. It writes that to ``failure.json``, every rank
its Python stacks to its log, and leaves with code 75. Counters instead of times: clocks of nodes
differ and may jump. Files instead of messages: they need nothing of the rank that hangs, and 512
ranks write about fifty small ones a second.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tropd.base import exits
from megatron_tropd.base.failures import Failure, read, report
from megatron_tropd.base.progress import IDLE, LONGEST_BEAT, START, Progress, limits

_LINE = 512  # bytes of a heartbeat, so that it is overwritten in place


@dataclass(frozen=True)
class Beat:
    """One heartbeat of one rank."""

    beat: int
    rank: int
    node: str
    pid: int
    step: int
    """The step being trained, from 1."""
    phase: str
    at: str
    """Innermost line of the training thread's Python."""
    whose: str = ""
    """Whose rank it is, if not all ranks train."""

    @property
    def waits(self) -> bool:
        """Whether it has nothing to do, or sits in a collective, as its innermost line tells."""
        if self.phase == IDLE:
            return True
        return "torch/distributed/" in self.at or "/pipeline_parallel/" in self.at


class Watchdog:
    """The thread of one rank. A context manager around the training."""

    def __init__(
        self,
        progress: Progress,
        *,
        folder: Path,
        failure: Path,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        whose: str = "",
        say: Callable[[str], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            folder: where all ranks keep their heartbeats (a shared file system).
            whose: this rank is, if not all ranks train.
        """
        self._progress, self._folder, self._failure = progress, folder, failure
        self._rank, self._world_size, self._minutes = rank, world_size, timeout_minutes
        self._say, self._whose = say, whose
        self._limit, self._limit_at_start, _ = limits(timeout_minutes)
        self.period = min(LONGEST_BEAT, self._limit / 10)
        self._beat = 0
        self._training = threading.get_ident()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
            threading.Thread(target=self._live, name="heartbeat", daemon=True),
        ]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            _path(self._folder, self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        """Count the seconds of the phase; never touches the file system, which may hang."""
        seen, waited, last = -1, 0.0, time.monotonic()
        while not self._over.wait(self.period):
            # By a thread of C: it speaks even if Python does not run any more.
            faulthandler.dump_traceback_later(self._limit_at_start, file=sys.stderr)
            now, entered = time.monotonic(), self._progress.entered
            # A job that was suspended and goes on has not hung: our own pauses do not count.
            waited += min(now - last, 3 * self.period)
            if entered != seen:
                seen, waited = entered, 0.0
            last = now
            if waited > self._limit_here():
                # Where reporting itself hangs.
                end = threading.Timer(60 + 10 * self.period, os._exit, [exits.RESTART])
                end.daemon = True
                end.start()
                self._report(waited)
                end.cancel()

    def _live(self) -> None:
        """Write heartbeats; and our stacks, once some rank has reported that nothing moves."""
        dumped = False
        while not self._over.wait(self.period):
            self._write_beat()
            if not dumped and (met := read(self._failure)) is not None and met.kind == "hung":
                faulthandler.dump_traceback(file=sys.stderr)
                dumped = True

    def _limit_here(self) -> float:
        phase = self._progress.phase
        if phase == IDLE:
            return math.inf
        return self._limit_at_start if phase == START else self._limit

    def _write_beat(self) -> None:
        self._beat += 1
        progress = self._progress
        beat = Beat(
            beat=self._beat,
            rank=self._rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            step=progress.step + 1,
            phase=progress.phase,
            at=_innermost_line(self._training),
            whose=self._whose,
        )
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            file = os.open(_path(self._folder, self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, json.dumps(asdict(beat)).encode()[:_LINE].ljust(_LINE), 0)
            finally:
                os.close(file)

    def _report(self, waited: float) -> None:
        """End the process; returns only if this rank goes on after all."""
        entered = self._progress.entered
        faulthandler.dump_traceback(file=sys.stderr)
        while read(self._failure) is None:
            is_first = self._is_first_to_look()
            if is_first:
                before = read_beats(self._folder, range(self._world_size))
            time.sleep(3 * self.period)
            if self._progress.entered != entered:  # slow, not hung
                if is_first:
                    self._leave_it_to_others()
                return
            if is_first:
                after = read_beats(self._folder, range(self._world_size))
                failure = self._describe(before, after, waited)
                self._say(failure.message)
                report(self._failure, failure)
                break
        time.sleep(2 * self.period)  # the others see it and write down their stacks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exits.RESTART)

    def _is_first_to_look(self) -> bool:
        """Whether this rank reads everybody's heartbeats; the others wait for what it reports.

        All ranks get here at about the same time: each reading all would be 512 x 512 reads, twice.
        """
        try:
            self._claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # full or failing: a report by each is better than none
            return True
        return True

    def _leave_it_to_others(self) -> None:
        with contextlib.suppress(OSError):
            self._claim.unlink()

    @property
    def _claim(self) -> Path:
        return self._folder / "looking"

    def _describe(self, before: dict[int, Beat], after: dict[int, Beat], waited: float) -> Failure:
        missing = [rank for rank in range(self._world_size) if rank not in after]
        silent = [rank for rank, beat in after.items() if beat == before.get(rank)]
        progress = self._progress
        why, suspects = _suspects(after, silent)
        first = after.get(suspects[0]) if suspects else None
        groups: dict[str, list[int]] = {}
        for rank, beat in after.items():
            state = "no sign of life, last seen" if rank in silent else "now"
            place = f"{state} in {beat.phase!r} of step {beat.step} at {beat.at}"
            groups.setdefault(place, []).append(rank)
        if missing:
            groups["no heartbeat at all"] = missing
        where = "; ".join(f"{_ranks(ranks, after)}: {text}" for text, ranks in groups.items())
        return Failure(
            kind="hung",
            message=(
                f"Nothing moves: rank {self._rank} has been in {progress.phase!r} of step "
                f"{progress.step + 1} for {waited:.0f} s (run.timeout_minutes = "
                f"{self._minutes:g}). {why}{where}. Python stacks are in logs/rank_*.log. Start "
                "the same command again to resume; if the phase is only slow, raise "
                "run.timeout_minutes."
            ),
            rank=first.rank if first else self._rank,
            node=first.node if first else socket.gethostname(),
            step=first.step if first else progress.step + 1,
            phase=first.phase if first else progress.phase,
        )


def read_beats(folder: Path, ranks: Iterable[int]) -> dict[int, Beat]:
    """The last heartbeat of each of ``ranks`` that left one, by rank."""
    beats = {}
    for rank in ranks:
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats[rank] = Beat(**json.loads(_path(folder, rank).read_text()))
    return beats


def _suspects(beats: dict[int, Beat], silent: list[int]) -> tuple[str, list[int]]:
    """Who probably keeps the others waiting, and the sentence that says so."""
    if silent:
        return f"Stopped or gone: {_ranks(silent, beats)}. ", silent
    places = [(beat.step, beat.phase) for beat in beats.values()]
    usual = max(set(places), key=places.count) if places else None
    elsewhere = [rank for rank, b in beats.items() if (b.step, b.phase) != usual]
    busy = [rank for rank, beat in beats.items() if not beat.waits]
    if 0 < len(busy) < len(beats):
        return f"Not waiting for others: {_ranks(busy, beats)}. ", busy
    if elsewhere:
        return f"Elsewhere than most: {_ranks(elsewhere, beats)}. ", elsewhere
    return "", []


def _ranks(ranks: Iterable[int], beats: dict[int, Beat]) -> str:
    shown = [
        f"{rank} ({_whose(beats[rank])}{beats[rank].node}, process {beats[rank].pid})"
        if rank in beats
        else str(rank)
        for rank in ranks
    ]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"rank{'s' if len(shown) > 1 else ''} {', '.join(shown[:4])}{more}"


def _whose(beat: Beat) -> str:
    return f"{beat.whose}, " if beat.whose else ""


def _innermost_line(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "?"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"[:200]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"
