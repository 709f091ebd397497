"""Every recipe is rehearsed at its full size, and agrees with its plan."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import load_config
from megatron_tropd.planning.planned_run import PlannedRun
from megatron_tropd.rehearsal import Rehearsal, Stage, rehearsal_table, rehearse
from megatron_tropd.rehearsal.record import EventCount
from megatron_tropd.rehearsal.report import findings

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
CHANNELS, WRITER = (
    "megatron_tropd/rollout/engines/transports.py",
    "megatron_tropd/rollout/weights/mailbox.py",
)
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Where all are rehearsed: what they import is imported once."""
    with Stage() as opened:
        yield opened


@pytest.fixture(scope="module")
def rehearsals(stage: Stage) -> dict[str, Rehearsal]:
    """One rank of the last stage of each, which has the loss, with one micro-batch run of all."""

    def one(name: str) -> Rehearsal:
        config = load_config(RECIPES / f"{name}.toml")
        parallel = config.parallel
        last = (parallel.pipeline - 1) * parallel.tensor * parallel.replicas
        return rehearse(config, ranks=[last], micro_batches=1, stage=stage)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(one, NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_agrees_with_its_plan(name: str, rehearsals: dict[str, Rehearsal]):
    rehearsal = rehearsals[name]
    assert findings(rehearsal) == []
    (rank,) = rehearsal.ranks
    phases = {phase.name: phase for phase in rank.phases}
    assert list(phases) == [
        *("build", "teacher", "student", "optimizer", "between steps", "sync", "checkpoint"),
    ]
    resident = phases["between steps"].difference
    assert resident is not None and abs(resident) < 0.01
    assert rank.resident_bytes < 6 * 2**30
    assert rank.collectives and rank.waits and rank.kernels
    assert f"rank {rank.rank}" in rehearsal_table(rehearsal)
    run = rehearsal.planned
    if run.options.teacher != "none":  # its layers take the host's memory, not the GPU's
        shards = run.parallel.tensor * run.parallel.pipeline
        assert rank.host_peak > run.element * run.teacher.parameters / shards / 2


def test_ranks_that_share_rows_agree_with_the_plan(stage: Stage):
    """TP 2 x CP 2 x PP 2; our own attention gathers the keys and values of whole rows."""
    layout = ["parallel.context=2", "parallel.data=1"]
    config = load_config(RECIPES / "qwen3_8b_one_node.toml", layout)
    rehearsal = rehearse(config, ranks=[6], micro_batches=1, stage=stage)
    assert findings(rehearsal) == []
    (rank,) = rehearsal.ranks
    assert "rank 6 (stage 1, tensor 0, data 0, context 1)" in rehearsal_table(rehearsal)
    shared = {one.what for one in rank.collectives if "CONTEXT_PARALLEL" in one.group}
    assert shared, "keys and values, and their gradients"


@pytest.mark.parametrize("name", NAMES)
def test_new_weights_go_from_gpu_to_gpu(name: str, rehearsals: dict[str, Rehearsal]):
    """By the trainer's own channel: one buffer after the other, which the host waits for twice."""
    rehearsal = rehearsals[name]
    (rank,), planned = rehearsal.ranks, rehearsal.planned
    waits = {(one.line.split(":")[0], one.what): one.count for one in rank.waits if _synced(one)}
    waits.pop(
        ("megatron_tropd/distill/reporter.py", "synchronize")
    )  # of the clock, when the phase is over
    buffers = (waits.pop((CHANNELS, "synchronize a stream")) - 1) // 2
    assert waits == {}, "nothing goes through the host"
    owns = rank.rank % (planned.parallel.world_size // planned.rollout.num_engines) == 0
    assert rank.engine_buffers == (buffers if owns else 0)
    assert rank.engine_bytes == _exported(planned)
    shape = planned.student.shape
    largest = max(2**28, planned.element * shape.vocab * shape.hidden)
    assert rank.engine_bytes / largest <= buffers < 2 * rank.engine_bytes / 2**28 + 2
    gpus = planned.rollout.engine_tensor_parallel
    meetings = sum(one.count for one in rank.collectives if _synced(one) and one.what == "barrier")
    assert meetings == (2 * buffers + 2 if gpus > 1 else 0)


def test_new_weights_go_through_a_folder_if_asked(stage: Stage):
    config = load_config(
        RECIPES / "qwen3_1.7b.toml",
        ["rollout.weight_transport=folder", "rollout.num_engines=1"],
    )
    rehearsal = rehearse(config, ranks=[0], micro_batches=1, stage=stage)
    (rank,) = rehearsal.ranks
    assert findings(rehearsal) == []
    of_the_host = [one for one in rank.waits if _synced(one) and one.what == "to the host"]
    assert {one.line.split(":")[0] for one in of_the_host} == {WRITER}
    assert sum(one.count for one in of_the_host) == 311, "each tensor, the output layer's too"
    assert (rank.engine_buffers, rank.engine_bytes) == (0, _exported(rehearsal.planned))


def test_stages_of_a_tied_student_agree_with_the_plan(stage: Stage):
    """Its embedding is saved by itself; a stage without receivers gathers only what it sends."""
    config = load_config(
        RECIPES / "qwen3_1.7b.toml",
        [
            *("parallel.pipeline=3", "parallel.data=2", "parallel.uneven_stages=true"),
            *("rollout.num_engines=1", "rollout.weight_transport=folder"),
        ],
    )
    rehearsal = rehearse(config, ranks=[0, 2, 4], micro_batches=1, stage=stage)
    differences = {
        (rank.stage, phase.name): phase.difference
        for rank in rehearsal.ranks
        for phase in rank.phases
        if phase.name in ("sync", "checkpoint")
    }
    assert differences == {key: pytest.approx(0, abs=0.03) for key in differences}


def test_copies_of_gradients_are_gone_when_the_engines_wake(stage: Stage):
    """Gradients in bfloat16 become float32 for the update: 4 bytes a parameter that stayed."""
    config = load_config(
        RECIPES / "qwen3_1.7b.toml",
        ["megatron.ddp.grad_reduce_in_fp32=false", "parallel.distributed_optimizer=false"],
    )
    assert findings(rehearse(config, ranks=[0], micro_batches=1, stage=stage)) == []


TEACHERS: dict[str, list[str]] = {
    "an average": ["teacher.placement=self", 'model.teacher=""', "teacher.ema_decay=0.9"],
    "its own prompts": ['teacher.context="{prompt} {solution}"'],
    "an average with its own prompts": [
        *("teacher.placement=self", 'model.teacher=""', "teacher.ema_decay=0.9"),
        'teacher.context="{prompt} {solution}"',
    ],
    "in another layout": ["teacher.parallel.pipeline=2"],
}
FEW = ["parallel.data=2", "rollout.num_engines=2", "rollout.engine_tensor_parallel=1"]


def _shallow(tmp_path: Path, name: str, **changed: object) -> Path:
    """A model with few layers, as config.json alone."""
    folder = tmp_path / name
    folder.mkdir()
    config = json.loads((RECIPES / "models" / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4} | changed))
    return folder


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_kind_of_teacher_agrees_with_the_plan(teacher: str, tmp_path: Path, stage: Stage):
    models = {"student": "Qwen3-1.7B", "teacher": "Qwen3-4B"}
    words = [f"model.{who}={_shallow(tmp_path, name)}" for who, name in models.items()]
    words += ["train.tokens_per_micro_batch=12288"]
    config = load_config(RECIPES / "qwen3_1.7b.toml", [*words, *FEW, *TEACHERS[teacher]])
    rehearsal = rehearse(config, ranks=[0], micro_batches=1, stage=stage)
    assert findings(rehearsal) == []
    resident = next(p for p in rehearsal.ranks[0].phases if p.name == "between steps")
    assert resident.difference is not None and abs(resident.difference) < 0.01


def test_several_teachers_agree_with_the_plan(tmp_path: Path, stage: Stage):
    """Two of them, each for half of the prompts, on the device one at a time."""
    text = (RECIPES / "qwen3_1.7b.toml").read_text()
    names = ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B")
    student, *teachers = (_shallow(tmp_path, name, vocab_size=151936) for name in names)
    text = re.sub("student = .*", f'student = "{student}"', text)
    text = re.sub("teacher = .*", "", text, count=1)
    text += "".join(
        f'[[teachers]]\nname = "t{n}"\nmodel = "{path}"\n' for n, path in enumerate(teachers)
    )
    (tmp_path / "run.toml").write_text(text)
    rehearsal = rehearse(
        load_config(tmp_path / "run.toml", FEW), ranks=[0, 1], micro_batches=1, stage=stage
    )
    rank, with_the_other = rehearsal.ranks
    assert findings(Rehearsal(rehearsal.planned, [rank])) == []
    peaks = [{p.name: p.peak for p in one.phases}["teacher"] for one in (rank, with_the_other)]
    assert peaks[0] > peaks[1]
    larger = max(model.parameters for model in rehearsal.planned.frozen)
    assert rank.host_peak > 2 * larger, "both are in the host's memory"


def _synced(one: EventCount) -> bool:
    return one.phase == "sync"


def _exported(planned: PlannedRun) -> int:
    """Bytes of a student as an engine gets it: a tied output layer, too."""
    shape = planned.student.shape
    return planned.element * (planned.student.parameters + shape.tied * shape.vocab * shape.hidden)


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="--rank must be between 0 and 31, found 32"):
        rehearse(load_config(RECIPES / "qwen3_8b.toml"), ranks=[32])


def test_a_layout_that_does_not_fit_is_refused():
    config = load_config(RECIPES / "qwen3_8b.toml", ["parallel.tensor=16", "parallel.data=1"])
    with pytest.raises((ConfigError, InputError), match="must divide"):
        rehearse(config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_nothing_is_left_of_a_rehearsal_that_is_ended(number: signal.Signals, code: int):
    """Ctrl-C as a script sends it: to the command alone, which has processes of its own."""
    command = [sys.executable, "-m", "megatron_tropd.cli"]
    with subprocess.Popen(
        [*command, "rehearse", str(RECIPES / "qwen3_8b.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as run:
        assert _within(60, lambda: len(_of_group(run.pid)) == 4), "two ranks, and who forked them"
        run.send_signal(number)
        assert run.wait(60) == code
        assert _within(60, lambda: _of_group(run.pid) == set())


def _of_group(group: int) -> set[int]:
    """Processes of a process group that still run."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                found.add(int(folder.name))
    return found


def _within(seconds: float, happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "megatron.model.recompute_granularity=selective",
                'megatron.model.recompute_modules=["moe"]',
            ],
            "this model is dense",
        ),
        (["megatron.model.fp8=hybrid"], "needs Transformer Engine"),
    ],
)
def test_what_the_trainer_refuses_is_refused(overrides: list[str], message: str, stage: Stage):
    with pytest.raises((ConfigError, InputError), match=message):
        rehearse(load_config(RECIPES / "qwen3_1.7b.toml", overrides), micro_batches=1, stage=stage)
