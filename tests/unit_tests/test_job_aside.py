"""What rank 0 alone does for the records, beside the step."""

import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.config import config_from_dict, config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.distill import job as jobs
from megatron_tropd.distill.job import Job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Rank 0 of a run of which nothing is loaded; every step dumps one example."""
    tables: dict[str, Any] = {
        "model": {"student": "s", "teacher": "t"},
        "rollout": {"prompts": "p", "max_new_tokens": 4},
        "train": {"steps": 5},
        "run": {"dir": str(tmp_path), "trajectories_every": 1},
    }
    settings = config_to_dict(config_from_dict(tables))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    made = Job(RunFolder(tmp_path), console=io.StringIO(), stop=SimpleNamespace(requested=False))
    made.is_main = True
    made.inputs = None
    monkeypatch.setattr(jobs, "example_line", lambda *_: "line\n")
    monkeypatch.setattr(jobs, "gather_examples", lambda _: {0: {}})
    return made


def keep(job: Job) -> None:
    job.keep_examples({}, [None])


def test_other_ranks_do_nothing_for_the_records(job: Job) -> None:
    job.is_main = False
    assert job.aside(lambda: 1 / 0) is None
    keep(job)
    assert not job.folder.trajectories.exists()


def test_the_step_does_not_wait_for_its_examples(job: Job, monkeypatch) -> None:
    """And a checkpoint does: a resumed run would never write those of an older step."""
    may_write, dump = threading.Event(), job.folder.trajectories / "step_000000.jsonl"

    def line(*_: object) -> str:
        may_write.wait(30)
        return "line\n"

    monkeypatch.setattr(jobs, "example_line", line)
    keep(job)
    assert not dump.exists(), "it came back before anything is written"
    job.step = 1
    may_write.set()
    job._settle_examples()
    assert dump.read_text() == "line\n", "of the step it was asked for in"


def test_what_goes_wrong_beside_the_step_ends_the_run(job: Job, monkeypatch) -> None:
    def line(*_: object) -> str:
        raise OSError(28, "no space left")

    monkeypatch.setattr(jobs, "example_line", line)
    keep(job)
    with pytest.raises(OSError, match="no space left"):
        keep(job)
