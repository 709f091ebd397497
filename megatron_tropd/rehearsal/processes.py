"""A process that believes in a GPU, and from it one for each rank, as many at a time as cores."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.planning.hardware import Hardware, load_hardware
from megatron_tropd.planning.planned_run import PlannedRun, plan_run
from megatron_tropd.planning.workload import PROMPT_TOKENS
from megatron_tropd.rehearsal.record import RankReport, Request

_RANKS = "megatron_tropd.rehearsal.rank"
_SHOWN = 12
"""Last lines of what a process printed, if it ends without a word."""
GPUS_PER_NODE = 8


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
    context_tokens: int | None = None,
    gpus_per_node: int = GPUS_PER_NODE,
    micro_batches: int | None = None,
    stage: "Stage | None" = None,
) -> Rehearsal:
    """Execute one step of a config on fake tensors.

    Args:
        config: the run; of its files only the models' config.json are read.
        ranks: which; none: one of the first, of a middle and of the last stage.
        prompt_tokens: assumed length of a prompt; responses are as long as allowed.
        context_tokens: assumed length of what a teacher reads in a prompt's place; None: the
            longest that there is room for.
        micro_batches: to run; None: as many as fill the pipeline, and one more.
        stage: where other rehearsals have been, with as many GPUs a node; None: one of its own.

    Raises:
        InputError: a config.json is missing or not supported, or the step fails on a rank: shapes
            that do not fit, tensors on two devices, values that only a device knows.
        ConfigError: the trainer would refuse the settings, or there is no such rank.
    """
    planned = plan_run(
        config,
        rehearsed_hardware(gpus_per_node),
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )
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
    asked = config_to_dict(config)
    requests = [
        Request(asked, rank, prompt_tokens, gpus_per_node, micro_batches, context_tokens)
        for rank in wanted
    ]
    if stage is not None:
        return Rehearsal(planned, stage.run(requests))
    with Stage(gpus_per_node) as own:
        return Rehearsal(planned, own.run(requests))


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


class Stage:
    """A process that has imported everything and forks one for each rank, for many rehearsals.

    It ends when its stdin does, and the ranks with it, so none outlives this one.
    """

    def __init__(self, gpus_per_node: int = GPUS_PER_NODE) -> None:
        """Start it; it imports meanwhile."""
        self._folder = tempfile.TemporaryDirectory()
        self._answers: dict[int, Future[int]] = {}
        self._lock, self._asked = threading.Lock(), 0
        self._ended: InputError | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", _RANKS, str(gpus_per_node), self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, requests: Sequence[Request]) -> list[RankReport]:
        """Rehearse ranks, as many at a time as there are cores.

        Raises:
            InputError: a step fails.
            ConfigError: the trainer would refuse the settings.
        """
        asked = [self._pool.submit(self._rehearse, request) for request in requests]
        try:
            return [one.result() for one in asked]
        finally:
            for one in asked:
                one.cancel()

    def close(self) -> None:
        """End it, and the ranks that run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def _rehearse(self, request: Request) -> RankReport:
        answer: Future[int] = Future()
        with self._lock:
            if self._ended:
                raise self._ended
            self._asked += 1
            number = self._asked
            self._answers[number] = answer
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):  # who listens says so
                self._process.stdin.write(f"{json.dumps([number, asdict(request)])}\n")
                self._process.stdin.flush()
        code = answer.result()
        said, errors = (Path(self._folder.name, f"{number}.{kind}") for kind in ("json", "err"))
        printed = said.read_text() if said.exists() else ""
        return _report(request, code, printed, errors.read_text())

    def _listen(self) -> None:
        """Tell who waits that a rank has ended; all of them, if the process has."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, code = map(int, line.split())
            self._answers.pop(number).set_result(code)
        with self._lock:
            self._ended = InputError(
                f"The process that rehearses ended with code {self._process.wait()}; above is what "
                "it printed."
            )
            for answer in self._answers.values():
                answer.set_exception(self._ended)


def _report(request: Request, code: int, printed: str, errors: str) -> RankReport:
    """What a process answered; raises what it says went wrong."""
    answer = json.loads(printed) if printed else {}
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
