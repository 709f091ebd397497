"""What rank 0 alone does for the records, beside the step."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.base.progress import Progress
from megatron_tropd.config import config_from_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.distill import reporter as module
from megatron_tropd.distill.reporter import Reporter


def make(root: Path, *, is_main: bool = True) -> Reporter:
    """The reporter of a run of which nothing is loaded; every step dumps one example."""
    tables: dict[str, Any] = {
        "model": {"student": "s", "teacher": "t"},
        "rollout": {"prompts": "p", "max_new_tokens": 4},
        "train": {"steps": 5},
        "run": {"dir": str(root), "trajectories_every": 1, "tensorboard": False},
    }
    inputs: Any = None
    return Reporter(
        config_from_dict(tables),
        inputs,
        RunFolder(root),
        console=io.StringIO(),
        progress=Progress(),
        is_main=is_main,
    )


@pytest.fixture
def reporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reporter]:
    """That of rank 0."""
    monkeypatch.setattr(module, "example_line", lambda *_: "line\n")
    monkeypatch.setattr(module, "gather_examples", lambda _: {0: {}})
    with make(tmp_path) as reporter:
        yield reporter


def keep(reporter: Reporter) -> None:
    sequences: Any = [None]
    reporter.keep_examples(0, {}, sequences)


def test_other_ranks_do_nothing_for_the_records(tmp_path: Path, reporter: Reporter) -> None:
    with make(tmp_path, is_main=False) as other:
        assert other.aside(lambda: 1 / 0) is None
        keep(other)
    assert not (tmp_path / "trajectories").exists()


def test_the_step_does_not_wait_for_its_examples(
    tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint does: a resumed run would never write those of an older step."""
    may_write, dump = threading.Event(), tmp_path / "trajectories" / "step_000000.jsonl"

    def line(*_: object) -> str:
        may_write.wait(30)
        return "line\n"

    monkeypatch.setattr(module, "example_line", line)
    keep(reporter)
    assert not dump.exists(), "it came back before anything is written"
    may_write.set()
    reporter.settle()
    assert dump.read_text() == "line\n"


def test_what_goes_wrong_beside_the_step_ends_the_run(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(*_: object) -> str:
        raise OSError(28, "no space left")

    monkeypatch.setattr(module, "example_line", line)
    keep(reporter)
    with pytest.raises(OSError, match="no space left"):
        keep(reporter)
