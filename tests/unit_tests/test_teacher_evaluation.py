"""The teacher is measured once in a run, before anything else has memory on the devices."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import Progress
from megatron_tropd.config import (
    Config,
    EvaluationSet,
    GraderConfig,
    config_from_dict,
    config_to_dict,
)
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill import session as sessions
from megatron_tropd.distill.evaluation import Evaluator, evaluation_settings
from megatron_tropd.distill.inputs import ProblemSet, _of_teachers
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.records import read_lines
from megatron_tropd.rollout.engines.device_memory import wait_for_memory

GIB = 2**30
PARTS = [part.name for part in fields(StepParts)]
PROBLEMS = [Prompt(0, (1, 2), "1+1=", {"answer": "2"})]
SET = ProblemSet(
    EvaluationSet(
        name="", problems="h", num_problems=500, max_new_tokens=4, grader=GraderConfig(), samples=1
    ),
    PROBLEMS,
    {"teacher": PROBLEMS},
)
INPUTS = SimpleNamespace(
    problem_sets=(SET,),
    tasks=None,
    routes=None,
    student=SimpleNamespace(config={}, companions=Path("student")),
    folders={},
    longest_rollout=lambda _: 8,
    longest_read=lambda _: 8,
    stop_token_ids=(0,),
    tokenizer=SimpleNamespace(decode=lambda *_, **__: "2"),
)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_run(root: Path, **evaluation: Any) -> tuple[Config, Evaluator]:
    """A run with one held-out problem, of which nothing is started; its evaluator on rank 0."""
    tables = {
        "model": {"student": "s", "teacher": "t"},
        "rollout": {"prompts": "p", "max_new_tokens": 4},
        "train": {"steps": 5},
        "run": {"dir": str(root), "tensorboard": False},
        "evaluation": {"problems": "h", **evaluation},
    }
    root.mkdir(exist_ok=True)
    config = config_from_dict(tables)
    (root / "config.json").write_text(json.dumps(config_to_dict(config)))
    return config, Evaluator(config, INPUTS, RunFolder(root), is_main=True, log=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evaluation", "due"),
    [
        ({}, True),
        ({"teacher": False}, False),
        ({"task": "reverse_kl"}, False),
    ],
)
def test_the_teacher_is_measured_unless_the_settings_say_otherwise(
    tmp_path: Path, evaluation: dict[str, Any], due: bool
) -> None:
    config, evaluator = make_run(tmp_path, **evaluation)
    answered = _of_teachers(config, SET.settings, PROBLEMS, cast(Any, None), 100)
    inputs = SimpleNamespace(
        **vars(INPUTS) | {"problem_sets": (replace(SET, of_teachers=answered),)}
    )
    evaluator._inputs = cast(Any, inputs)
    assert bool(evaluator.teachers_due()) is due


def test_a_run_that_resumes_keeps_what_it_measured(tmp_path: Path) -> None:
    config, evaluator = make_run(tmp_path)
    settings = evaluation_settings(config, cast(Any, INPUTS), SET)
    with_settings = {"step": 0, "model": "teacher", "accuracy": 1.0, "settings": settings}
    with_settings |= {"digests": evaluator._digests(SET)}
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write_evaluation(with_settings)
    log.write_evaluation(with_settings | {"model": "student"})
    assert not evaluator.teachers_due()
    log.truncate_after(-1)  # killed before the first checkpoint
    assert [r["model"] for r in read_lines(RunFolder(tmp_path).evaluations)] == ["teacher"]
    assert not evaluator.teachers_due()
    longer = replace(SET, settings=replace(SET.settings, max_new_tokens=7))
    evaluator._inputs = cast(Any, SimpleNamespace(**vars(INPUTS) | {"problem_sets": (longer,)}))
    assert evaluator.teachers_due(), "answers were shorter"
    others = replace(SET, problems=[Prompt(0, (1, 2), "1+2=", {"answer": "3"})])
    evaluator._inputs = cast(Any, SimpleNamespace(**vars(INPUTS) | {"problem_sets": (others,)}))
    assert evaluator.teachers_due(), "other problems"


def test_without_the_teacher_a_summary_has_none(tmp_path: Path) -> None:
    _, evaluator = make_run(tmp_path, teacher=False)
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write_evaluation(
        {"step": 0, "model": "student", "accuracy": 0.5, "unjudged": 0, "total": 1}
    )
    assert evaluator.summary()["teacher"] is None


class Engines:
    """A pool that writes down what happens to it."""

    def __init__(self, model: str, calls: list[str]) -> None:
        self.model, self.calls = model, calls
        calls.append(f"{model}: start")

    def generate(self, requests: list[SampleRequest], sampling: Sampling) -> list[Sample]:
        self.calls.append(f"{self.model}: generate")
        return [Sample((2,), (-1.0,), "stop") for _ in requests]

    @contextmanager
    def awake(self) -> Iterator[None]:
        yield
        self.calls.append(f"{self.model}: sleep")

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append(f"{self.model}: close")


def test_the_teachers_engine_is_gone_before_others_take_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    make_run(tmp_path)
    ranks = SimpleNamespace(rank=0, world_size=1, is_main=True)
    parts = cast(Any, StepParts)(**dict.fromkeys(PARTS))
    teacher = SimpleNamespace(close=lambda: None)

    def start(model: str, *_: object, **__: object) -> Engines:
        return Engines(model, calls)

    def build(*_: object, **named: object) -> StepParts:
        calls.append("build models")
        return replace(parts, teacher=teacher)

    monkeypatch.setattr(sessions.platform, "has_cuda", lambda: True)
    monkeypatch.setattr(sessions, "load_inputs", lambda _: INPUTS)
    saved = SimpleNamespace(check_memory=lambda _: None)
    monkeypatch.setattr(sessions, "Checkpoints", lambda *_, **__: saved)
    monkeypatch.setattr(sessions, "rollout_source", lambda *_, **__: None)
    monkeypatch.setattr(sessions, "start_engines", start)
    monkeypatch.setattr(sessions, "step_parts", build)
    monkeypatch.setattr(sessions, "free_bytes", lambda: calls.append("look at memory") or 70 * GIB)
    monkeypatch.setattr(
        sessions,
        "wait_for_memory",
        lambda before, who: calls.append(f"wait for {before // GIB} GiB"),
    )
    for name, found in {
        "join_ranks": ranks,
        "leave_ranks": None,
        "check_settings": None,
        "hf_folders": {"student": tmp_path, "teacher": tmp_path},
    }.items():
        monkeypatch.setattr(sessions.startup, name, lambda *_, found=found, **__: found)
    console, stop = io.StringIO(), cast(Any, SimpleNamespace(requested=False))

    def opened() -> Any:
        folder = RunFolder(tmp_path)
        return sessions.open_session(folder, console=console, stop=stop, progress=Progress())

    with opened():
        assert calls == [
            *("look at memory", "teacher: start", "teacher: generate", "teacher: close"),
            *("wait for 70 GiB", "student: start", "student: sleep", "build models"),
        ]
    del calls[:]
    assert console.getvalue().count("waiting for the") == 2
    (record,) = read_lines(RunFolder(tmp_path).evaluations)
    assert (record["model"], record["step"], record["total"]) == ("teacher", 0, 1)
    with opened():
        assert calls == ["student: start", "student: sleep", "build models"], "resumed"


def test_each_problem_is_answered_by_its_own_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"answer": str(2 + i % 2), "source": ("even", "odd")[i % 2]} for i in range(4)]
    problems = [Prompt(i, "1+1=", (1, i), line) for i, line in enumerate(lines)]
    whose = {"teacher a": problems[1:], "teacher b": [], "teacher c": problems[:1]}
    says = SimpleNamespace(decode=lambda *_, **__: "answer: 2")
    asked = (replace(SET, problems=problems, of_teachers=whose),)
    changed = {"problem_sets": asked, "tokenizer": says}
    inputs = SimpleNamespace(**vars(INPUTS) | changed)
    config, _ = make_run(tmp_path)
    log = MetricsLog(tmp_path, tensorboard=False)
    folder = RunFolder(tmp_path)
    evaluator = Evaluator(config, inputs, folder, is_main=True, log=log)  # type: ignore[arg-type]
    calls: list[str] = []
    monkeypatch.setattr(sessions, "wait_for_memory", lambda *_: calls.append("wait"))
    reporter = cast(Any, SimpleNamespace(clock=lambda _: nullcontext()))
    start = cast(Any, lambda who: Engines(who, calls))
    sessions._measure_teachers(evaluator, reporter, asked, start)
    of_one = [f"teacher a: {what}" for what in ("start", "generate", "close")]
    of_other = [f"teacher c: {what}" for what in ("start", "generate", "close")]
    assert calls == [*of_one, "wait", *of_other, "wait"], "the second has no problem"
    (record,) = read_lines(folder.evaluations)
    assert (record["model"], record["total"], record["accuracy"]) == ("teacher", 4, 0.5)
    assert (record["accuracy/even"], record["accuracy/odd"]) == (1.0, 0.0)
    assert [example["prompt_index"] for example in record["examples"]] == [0, 1, 2, 3]


def test_runs_share_what_the_teacher_reached(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    calls: list[str] = []
    for name, starts in (("one", True), ("two", False)):
        kept = {"teacher_results": str(tmp_path / "kept")}
        _, evaluator = make_run(tmp_path / name, **kept)
        evaluator._log = MetricsLog(tmp_path / name, tensorboard=False)
        due = evaluator.teachers_due()
        assert bool(due) is starts, name
        if due:
            (found,) = evaluator.answers_of(cast(Any, Engines("teacher", calls)), due, "teacher")
            evaluator.measure_teacher(SET, found)
        (record,) = read_lines(RunFolder(tmp_path / name).evaluations)
        assert (record["model"], record["total"], record["accuracy"]) == ("teacher", 1, 0.0)
        assert (tmp_path / name / "evaluations" / "teacher" / "heldout.jsonl").is_file()
        assert not evaluator.teachers_due()
    _, evaluator = make_run(tmp_path / "three", **kept)
    other = replace(SET, problems=[Prompt(0, (1, 2), "1+2=", {"answer": "3"})])
    evaluator._inputs = cast(Any, SimpleNamespace(**vars(INPUTS) | {"problem_sets": (other,)}))
    assert evaluator.teachers_due(), "of other problems nothing is known"


def test_memory_that_comes_back_is_waited_for() -> None:
    free = iter([10 * GIB, 40 * GIB, 70 * GIB - 2**20])
    wait_for_memory(70 * GIB, "the engine", free=lambda: next(free))
    assert next(free, None) is None
    wait_for_memory(None, "the engine")  # without CUDA there is nothing to wait for


def test_memory_that_does_not_come_back_is_an_error_with_the_numbers() -> None:
    expected = r"70\.0 GiB were free .* before the engine started, and 0 s after it ended 10\.0 GiB"
    with pytest.raises(TrainingError, match=expected) as caught:
        wait_for_memory(70 * GIB, "the engine", seconds=0, free=lambda: 10 * GIB)
    assert caught.value.kind == "device"
