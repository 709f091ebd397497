"""The process that rehearses one rank: a line of JSON on stdin, the report on stdout.

Nothing of Megatron may be imported before the process believes in a GPU, so imports are inside.
"""

import json
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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

_MAKERS = 8
"""Lines shown that hold most of a peak."""


def main() -> int:
    """Answer one request."""
    request, answer_to = Request(**json.loads(sys.stdin.readline())), _keep_stdout()
    threading.Thread(target=_end_with_asker, daemon=True).start()
    warnings.simplefilter("ignore")
    config = config_from_dict(request.config)
    try:
        answer: dict[str, Any] = {"report": rehearse_rank(config, request).values()}
    except (ConfigError, InputError) as error:
        kind = "config" if isinstance(error, ConfigError) else "input"
        answer = {kind: str(error)}
    except Exception as error:
        traceback.print_exc()
        answer = {"input": _failure(request.rank, error)}
    print(json.dumps(answer), file=answer_to, flush=True)
    return 0


def rehearse_rank(config: Config, request: Request) -> RankReport:
    """Be a rank from its start to its first checkpoint. The process can do nothing else after."""
    start = time.perf_counter()
    planned = plan_run(
        config,
        rehearsed_hardware(request.gpus_per_node),
        prompt_tokens=request.prompt_tokens,
    )
    device = Device(Tracker(line_running), Events())
    cuda.believe(device, gpus=request.gpus_per_node)
    with device, tempfile.TemporaryDirectory() as folder:
        others = world.join(device, rank=request.rank, world_size=planned.parallel.world_size)
        world.route_evenly()
        from megatron_tropd.rehearsal import engines
        from megatron_tropd.rehearsal.step import RehearsedRank

        engines.believe(planned, others, Path(folder))
        rehearsed = RehearsedRank(planned, RunFolder(Path(folder)), device, others)
        counts = _rehearse(rehearsed, request.micro_batches)
        return _report(rehearsed, counts, time.perf_counter() - start)


def _rehearse(rank: "RehearsedRank", wanted: int | None) -> dict[str, Counter[Any]]:
    """Build, two steps, export, checkpoint; the events of all, as of one whole step.

    The first step leaves the optimizer's states, and its one micro-batch less (one for each stage,
    if there are virtual stages) tells what each further one adds.
    """
    device, parallel = rank.device, rank.planned.parallel
    whole, unit = rank.planned.work.most_micro_batches, parallel.batch_multiple
    fill = parallel.pipeline + 1 if unit == 1 else 2 * unit
    run = min(whole, fill if wanted is None else wanted)
    rank.build()
    before = device.events.take()
    rank.learn(max(run - unit, unit))
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
    """End when stdin does: whoever asked is gone, or has had enough."""
    os.read(0, 1)
    os._exit(1)


def _keep_stdout() -> IO[str]:
    """Stdout for the answer; what anybody else prints goes to stderr."""
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answer_to


if __name__ == "__main__":
    sys.exit(main())
