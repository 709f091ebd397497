"""A teacher on ranks of its own: settings, who is who, and the timeline of both kinds of rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.progress import IDLE, Progress
from megatron_tropd.cluster.job_layout import make_layout
from megatron_tropd.cluster.site import Site
from megatron_tropd.config import Config, ModelParallelConfig, ParallelConfig, TeacherConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.launch.watchdog import Beat
from megatron_tropd.mcore.bridge import Worlds
from megatron_tropd.report.timeline import (
    Span,
    Timeline,
    hidden_share,
    page_timeline,
    read_timeline,
)
from tests.step_parts import config_of_parts


def _config(layout: ParallelConfig | None = None, **teacher: Any) -> Config:
    from megatron_tropd.config import TrainConfig

    known = {"placement": "separate", "ranks": 2} | teacher
    train = TrainConfig(steps=1, lr=1e-3, tokens_per_micro_batch=64)
    source = TeacherConfig(**known)
    layout = layout or ParallelConfig(tensor=2)
    return config_of_parts("a", "b", layout, train, preset("tropd"), source=source)


def test_the_job_has_the_ranks_of_both():
    config = _config(parallel=ModelParallelConfig(pipeline=2))
    assert config.world_size == 4 and config.parallel.world_size == 2
    assert [config.teaches(rank) for rank in range(4)] == [False, False, True, True]
    assert config.teacher_parallel.pipeline == 2 and config.teacher_parallel.data == 1
    assert _config().teacher_parallel.data == 2
    assert not config.scores_here and config.loads_teacher
    worlds = Worlds(2, 2)
    assert worlds.own(1) == ("student", 0, 2) and worlds.own(3) == ("teacher", 2, 2)


@pytest.mark.parametrize(
    "teacher, words",
    [
        (dict(ranks=None), "needs the number of ranks"),
        (dict(placement="resident"), "do not go together"),
        (dict(ranks=3, parallel=ModelParallelConfig(tensor=2)), "the 3 ranks of the teacher"),
        (dict(context="{prompt}"), "teacher.context is read on the student's ranks"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        _config(**teacher)


def test_a_slurm_job_has_nodes_for_both():
    site = Site(partition="", account="", time="30", gpus_per_node=2)
    config = replace(_config(ranks=4), rollout=replace(_config().rollout, num_engines=1))
    layout = make_layout(config, site)
    assert (layout.training_nodes, layout.ranks_per_node) == (3, 2)
    with pytest.raises(ConfigError, match=r"teacher\.ranks = 3"):
        make_layout(_config(ranks=3), site)


def test_a_rank_with_nothing_to_do_is_not_suspected():
    beat = Beat(1, 2, "node", 3, 4, IDLE, "mcore/bridge.py:80 hear")
    assert beat.waits and not replace(beat, phase="scoring").waits


def test_what_the_student_does_not_wait_for_is_hidden(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    progress = Progress()
    for kind, phase in (("student", "rollout"), ("teacher", "scoring")):
        with Timeline(tmp_path, kind).phase(phase, progress.step + 1):
            pass
    assert {kind: [s.phase for s in found] for kind, found in read_timeline(tmp_path).items()} == {
        "student": ["rollout"],
        "teacher": ["scoring"],
    }
    shown = page_timeline(tmp_path)
    assert shown is not None and set(shown["rows"]) == {"student", "teacher"}
    spans = {
        "student": [Span(1, "teacher", 0.0, 2.0), Span(1, "student", 2.0, 6.0)],
        "teacher": [Span(1, "scoring", 0.0, 2.0), Span(2, "scoring", 3.0, 5.0)],
    }
    assert hidden_share(spans) == 0.5
    assert page_timeline(tmp_path / "none") is None
