"""A process for each rank to rehearse, as many at a time as there are cores."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import IO

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.planning.hardware import Hardware, load_hardware
from megatron_tropd.planning.planned_run import PlannedRun, plan_run
from megatron_tropd.planning.workload import PROMPT_TOKENS
from megatron_tropd.rehearsal.record import RankReport, Request

_RANK = "megatron_tropd.rehearsal.rank"
_SHOWN = 12
"""Last lines of what a process printed, if it ends without a word."""


@dataclass(frozen=True)
class Rehearsal:
    """The rehearsed ranks of a config."""

    planned: PlannedRun
    ranks: list[RankReport]


def rehearse(
    config: Config,
    *,
    ranks: Sequence[int] = (),
    prompt_tokens: int = PROMPT_TOKENS,
    gpus_per_node: int = 8,
    micro_batches: int | None = None,
) -> Rehearsal:
    """Execute one step of a config on fake tensors.

    Args:
        config: the run; of its files only both models' config.json are read.
        ranks: which; none: one of the first, of a middle and of the last stage.
        prompt_tokens: assumed length of a prompt; responses are as long as allowed.
        micro_batches: to run; None: as many as fill the pipeline, and one more.

    Raises:
        InputError: a config.json is missing or not supported, or the step fails on a rank: shapes
            that do not fit, tensors on two devices, values that only a device knows.
        ConfigError: the trainer would refuse the settings, or there is no such rank.
    """
    planned = plan_run(config, rehearsed_hardware(gpus_per_node), prompt_tokens=prompt_tokens)
    wanted = list(ranks) or default_ranks(planned)
    world = planned.parallel.world_size
    if unknown := [rank for rank in wanted if not 0 <= rank < world]:
        raise ConfigError(f"--rank must be between 0 and {world - 1}, found {unknown[0]}.")
    if micro_batches is not None and micro_batches < 1:
        raise ConfigError(f"--micro-batches must be at least 1, found {micro_batches}.")
    if micro_batches is not None and micro_batches % config.parallel.batch_multiple:
        raise ConfigError(
            f"--micro-batches must be a multiple of parallel.pipeline = {config.parallel.pipeline} "
            f"with virtual stages, found {micro_batches}."
        )
    requests = [
        Request(config_to_dict(config), rank, prompt_tokens, gpus_per_node, micro_batches)
        for rank in wanted
    ]
    processes = _Processes()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            return Rehearsal(planned, list(pool.map(processes.run, requests)))
        except BaseException:  # one rank fails, or the user has had enough
            processes.end()
            raise


def rehearsed_hardware(gpus_per_node: int) -> Hardware:
    """What the plan beside a rehearsal is made for: the layers that are rehearsed."""
    return replace(load_hardware("h100"), layers="local", gpus_per_node=gpus_per_node)


def default_ranks(planned: PlannedRun) -> list[int]:
    """The first rank of the first stage, of a middle one and of the last."""
    of_stage = planned.parallel.tensor * planned.parallel.replicas
    stages = sorted({0, planned.parallel.pipeline // 2, planned.last_stage})
    if planned.parallel.pipeline == 2:
        stages = [0, 1]
    return [stage * of_stage for stage in stages]


class _Processes:
    """Those that rehearse. Each ends when its stdin does, so none outlives this one."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._ended = False

    def run(self, request: Request) -> RankReport:
        """Rehearse one rank in a new process, and wait for it."""
        with tempfile.TemporaryFile("w+") as errors:
            process = self._start(errors)
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError), process.stdin, process.stdout:
                process.stdin.write(json.dumps(asdict(request)) + "\n")
                process.stdin.flush()
                printed = process.stdout.read()
            process.wait()
            errors.seek(0)
            return _report(request, process.returncode, printed, errors.read())

    def end(self) -> None:
        """End all that run; none will start."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()

    def _start(self, errors: IO[str]) -> "subprocess.Popen[str]":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._lock:
            if self._ended:
                raise CancelledError
            process = subprocess.Popen(
                [sys.executable, "-m", _RANK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
            self._running.append(process)
        return process


def _report(request: Request, code: int, printed: str, errors: str) -> RankReport:
    """What a process answered; raises what it says went wrong."""
    lines = printed.splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "report" in answer:
        return RankReport.of(answer["report"])
    if "config" in answer:
        raise ConfigError(answer["config"])
    if "input" in answer:
        raise InputError(answer["input"])
    last = "\n".join(errors.splitlines()[-_SHOWN:])
    raise InputError(
        f"The rehearsal of rank {request.rank} ended with code {code}, and printed last:\n{last}"
    )
