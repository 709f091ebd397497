"""A rehearsed rank calls the collectives of the real one: tiny pairs over gloo, and fake ones.

What a CPU does otherwise is left out of the comparison: it has passes of its own over the logits
(``TROPD_PLAIN`` gives both plain torch), and objects travel as tensors.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.config import (
    Config,
    ModelConfig,
    ModelParallelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_tropd.planning.hardware import Hardware
from megatron_tropd.planning.planned_run import plan_run
from tests.ranks import run_with_env
from tests.tiny_models import write_tiny_model

CPU = Hardware(
    name="cpu",
    memory_gb=24,
    tflops=0.2,
    memory_gb_s=40,
    intra_node_gb_s=5,
    network_gb_s=1,
    layers="cpu",
)
PROMPT = 8
"""Responses fill rows of 128 positions a rank, to which they are rounded up on CUDA."""
LAYOUTS = {
    "TP 2 x PP 2": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "TP 2 x DP 2": {"tensor": 2, "data": 2, "distributed_optimizer": True},
    "TP 2 x DP 2, teacher PP 2": {"tensor": 2, "data": 2, "teacher": {"pipeline": 2}},
    "PP 2 x VPP 2 x DP 2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "CP 2 x DP 2": {"context": 2, "data": 2, "distributed_optimizer": True},
}
OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")


def _config(folder: Path, layout: dict[str, Any]) -> Config:
    return Config(
        model=ModelConfig(
            student=str(folder / "student"), teacher=str(folder / "teacher"), dtype="bfloat16"
        ),
        rollout=RolloutConfig(
            prompts="none",
            max_new_tokens=128 * layout.get("context", 1) - PROMPT + 1,
            prompts_per_step=4,
        ),
        train=TrainConfig(steps=4, tokens_per_micro_batch=256),
        run=RunConfig(dir="none"),
        parallel=ParallelConfig(**{k: v for k, v in layout.items() if k != "teacher"}),
        teacher=TeacherConfig(
            parallel=ModelParallelConfig(**layout["teacher"]) if "teacher" in layout else None
        ),
    )


class _Recorder(TorchDispatchMode):
    """Notes the collectives that really happen."""

    def __init__(self, world: Any) -> None:
        super().__init__()
        self.world = world
        self.inside_objects = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not self.inside_objects:
            self.world.record(func, args)
        return func(*args, **(kwargs or {}))

    def note_objects(self, name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.world.note(name, None, [])
            self.inside_objects = True
            try:
                return original(*args, **kwargs)
            finally:
                self.inside_objects = False

        return call


def _really(config: Config, folder: Path, layout: dict[str, Any]) -> None:
    """One rank: two steps, an export and the state of a checkpoint, on real tensors."""
    from megatron_tropd.config.run_folder import RunFolder
    from megatron_tropd.convert.megatron_folder import open_model
    from megatron_tropd.mcore import platform
    from megatron_tropd.rehearsal.events import Events, line_running
    from megatron_tropd.rehearsal.memory import Tracker
    from megatron_tropd.rehearsal.step import RehearsedRank
    from megatron_tropd.rehearsal.world import World

    class Place:
        events, tracker = Events(), Tracker(line_running)

    os.environ["TROPD_PLAIN"] = "1"  # the server that forks ranks has another environment
    platform.prepare_platform()
    world = World(Place.events)
    recorder = _Recorder(world)
    for name in OBJECTS:
        setattr(dist, name, recorder.note_objects(name))
    rank = int(os.environ["RANK"])
    planned = plan_run(config, CPU, prompt_tokens=PROMPT)
    run_folder, place = RunFolder(folder / f"run_{rank}"), cast(Any, Place)
    rehearsed = RehearsedRank(planned, run_folder, place, world, open_model)
    with recorder:
        whole = planned.work.most_micro_batches
        rehearsed.build()
        rehearsed.learn(whole)
        Place.events.take()
        rehearsed.learn(whole)
        rehearsed.export()
        rehearsed.save()
    counts = Counter()
    for one, count in Place.events.collectives.items():
        counts[one.phase, one.what, one.size, one.bytes] += count
    (folder / f"real_{rank}.json").write_text(
        json.dumps(sorted([*k, n] for k, n in counts.items()))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_are_those_of_a_real_run(layout: str, tmp_path: Path, monkeypatch):
    from megatron_tropd.rehearsal import rehearse

    monkeypatch.setenv("TROPD_PLAIN", "1")
    layers = 4 if "VPP" in layout else 2
    write_tiny_model(tmp_path / "student", "qwen3", seed=1, num_hidden_layers=layers)
    write_tiny_model(tmp_path / "teacher", "qwen3", seed=2, num_hidden_layers=layers)
    config = _config(tmp_path, LAYOUTS[layout])
    run_with_env(4, _really, config, tmp_path, LAYOUTS[layout])
    whole = plan_run(config, CPU, prompt_tokens=PROMPT).work.most_micro_batches
    rehearsal = rehearse(config, ranks=[0, 3], prompt_tokens=PROMPT, micro_batches=whole)
    for rank in rehearsal.ranks:
        real = [tuple(one) for one in json.loads((tmp_path / f"real_{rank.rank}.json").read_text())]
        counts: Counter[Any] = Counter()
        for one in rank.collectives:
            if one.phase != "build":
                counts[one.phase, one.what, one.size, one.bytes] += one.count
        rehearsed = sorted((*key, count) for key, count in counts.items())
        assert set(rehearsed) ^ set(real) == set()
        assert len(real) > 8
