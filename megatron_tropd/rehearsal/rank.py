"""The processes that rehearse ranks, one each, forked from one that believes in a GPU.

Of a line of JSON on stdin, [number, request], a child makes NUMBER.json in a folder, and what it
prints goes to NUMBER.err there; "NUMBER CODE" on stdout says that it has ended. Nothing of Megatron
may be imported before the process believes in a GPU, so imports are inside.
"""

import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.config import Config, config_from_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.planning.memory import Memory, memory_of_stage
from megatron_tropd.planning.planned_run import plan_run
from megatron_tropd.rehearsal import cuda, world
from megatron_tropd.rehearsal.events import Events, line_of, line_running
from megatron_tropd.rehearsal.memory import Tracker
from megatron_tropd.rehearsal.processes import rehearsed_hardware
from megatron_tropd.rehearsal.record import EventCount, PhaseBytes, RankReport, Request
from megatron_tropd.rehearsal.tensors import Device

if TYPE_CHECKING:
    from megatron_tropd.rehearsal.step import RehearsedRank

_POLL_SECONDS = 0.05
_MAKERS = 8
"""Lines shown that hold most of a peak."""


def main() -> None:
    """Fork a rank for every request, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks has had it, too, and ends us
    threading.Thread(target=_end_with_asker, daemon=True).start()
    gpus, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    answers = os.dup(1)
    os.dup2(2, 1)  # what anybody else prints
    scene = _Scene(gpus)
    running: dict[int, int] = {}
    waiting = b""
    while True:
        # A child is looked for as often as anybody would notice.
        if select.select([0], [], [], _POLL_SECONDS if running else None)[0]:
            *lines, waiting = (waiting + os.read(0, 2**16)).split(b"\n")
            for number, request in map(json.loads, lines):
                running[number] = _forked(scene, Request(**request), folder / str(number))
        for number, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[number]
                os.write(answers, f"{number} {os.waitstatus_to_exitcode(status)}\n".encode())


class _Scene:
    """What every rank has: a GPU that is believed in, other ranks that answer, all imports."""

    def __init__(self, gpus: int) -> None:
        import_module("megatron_tropd.data.tokenizers")  # transformers needs no GPU
        self.device = Device(Tracker(line_running), Events())
        cuda.believe(self.device, gpus=gpus)
        with self.device:
            self.world = world.believe(self.device)
            import_module("megatron_tropd.rehearsal.step")
            world.route_evenly()
        gc.collect()
        gc.freeze()  # the ranks' collectors have enough to look at


def _forked(scene: _Scene, request: Request, answer_to: Path) -> int:
    """Rehearse a rank in a child; its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        threading.Thread(target=_end_with_asker, daemon=True).start()
        errors = os.open(f"{answer_to}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        Path(f"{answer_to}.json").write_text(json.dumps(_answer(scene, request)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _answer(scene: _Scene, request: Request) -> dict[str, Any]:
    config = config_from_dict(request.config)
    try:
        return {"report": rehearse_rank(scene, config, request).values()}
    except (ConfigError, InputError) as error:
        kind = "config" if isinstance(error, ConfigError) else "input"
        return {kind: str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"input": _failure(request.rank, error)}


def rehearse_rank(scene: _Scene, config: Config, request: Request) -> RankReport:
    """Be a rank from its start to its first checkpoint. The process can do nothing else after."""
    start = time.perf_counter()
    planned = plan_run(
        config,
        rehearsed_hardware(request.gpus_per_node),
        prompt_tokens=request.prompt_tokens,
        context_tokens=request.context_tokens,
    )
    device, others = scene.device, scene.world
    with device, tempfile.TemporaryDirectory() as folder:
        world.join(rank=request.rank, world_size=planned.parallel.world_size)
        from megatron_tropd.rehearsal import engines
        from megatron_tropd.rehearsal.step import RehearsedRank

        engines.believe(planned, others, Path(folder))
        rehearsed = RehearsedRank(planned, RunFolder(Path(folder)), device, others)
        counts = _rehearse(rehearsed, request.micro_batches)
        return _report(rehearsed, counts, time.perf_counter() - start)


def _rehearse(rank: "RehearsedRank", wanted: int | None) -> dict[str, Counter[Any]]:
    """Build, two steps, export, checkpoint; the events of all, as of one whole step.

    The first step leaves the optimizer's states, and its one micro-batch less (one for each stage,
    if there are virtual stages) tells what each further one adds. If none would be left, the
    optimizer alone makes it.
    """
    device, parallel = rank.device, rank.planned.parallel
    whole, unit = rank.planned.work.most_micro_batches, parallel.batch_multiple
    fill = parallel.pipeline + 1 if unit == 1 else 2 * unit
    run = min(whole, fill if wanted is None else wanted)
    rank.build()
    before = device.events.take()
    if run > unit:
        rank.learn(run - unit)
    else:
        rank.update()
    fewer = device.events.take()
    device.tracker.forget_phases("build")
    rank.learn(run)
    more = device.events.take()
    rank.export()
    rank.save()
    after = device.events.take()
    rank.run_micro_batches = run
    added = (whole - run) // unit if run > unit else 0
    return {
        name: before[name] + _whole_step(more[name], fewer[name], added) + after[name]
        for name in before
    }


def _whole_step(more: Counter[Any], fewer: Counter[Any], added: int) -> Counter[Any]:
    """Events of a step of which only some micro-batches were run."""
    return Counter({event: n + added * max(n - fewer[event], 0) for event, n in more.items()})


def _report(rank: "RehearsedRank", counts: dict[str, Counter[Any]], seconds: float) -> RankReport:
    tracker, layout = rank.device.tracker, rank.layout
    planned = _planned(memory_of_stage(rank.planned, layout.pp_rank))
    phases = [
        PhaseBytes(
            name=name,
            peak=phase.peak,
            end=phase.end,
            planned=planned.get(name),
            makers=phase.makers.most_common(_MAKERS),
        )
        for name, phase in tracker.phases.items()
    ]
    return RankReport(
        rank=layout.rank,
        stage=layout.pp_rank,
        tensor_rank=layout.tp_rank,
        data_rank=layout.dp_rank,
        context_rank=layout.cp_rank,
        micro_batches=rank.planned.work.most_micro_batches,
        run_micro_batches=rank.run_micro_batches,
        phases=phases,
        collectives=[EventCount(count=n, **vars(c)) for c, n in counts["collectives"].items()],
        waits=[EventCount(count=n, **vars(c)) for c, n in counts["waits"].items()],
        kernels=[EventCount(count=n, **vars(c)) for c, n in counts["kernels"].items()],
        engine_bytes=rank.engine_bytes,
        engine_buffers=rank.engine.updates,
        checkpoint_bytes=rank.checkpoint_bytes,
        host_peak=rank.device.host_tracker.most,
        seconds=seconds,
        cpu_seconds=time.process_time(),
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
    )


def _planned(memory: Memory) -> dict[str, float]:
    """The planner's bytes by the trainer's names of phases; engines are not rehearsed."""
    return memory.trainer | {"between steps": memory.resident, "build": memory.build}


def _failure(rank: int, error: Exception) -> str:
    """What a user can act on: the error, and the last line of ours or Megatron's."""
    line = line_of(error)
    kind = "" if isinstance(error, TrainingError) else f"{type(error).__name__}: "
    return f"The step fails on rank {rank}, at {line}: {kind}{error}"


def _end_with_asker() -> None:
    """End when stdin does: whoever asks is gone, or has had enough."""
    asker = select.poll()
    asker.register(0, 0)
    asker.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
