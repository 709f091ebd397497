"""Both worlds of a job in one process: a rank of each in a thread, and a stand-in of the bridge.

What crosses, in which order and when is the real thing; only the wires are not.
"""

import queue
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from megatron_tropd.base.progress import Progress
from megatron_tropd.config import ParallelConfig, TeacherConfig
from megatron_tropd.config.loss import preset
from tests.distributed.test_other_layout import TRAIN, _compare, _numbers, _start
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import run_with_env
from tests.step_parts import build_parts, config_of_parts


class _Wires:
    """Between two ranks: rows from each to each."""

    def __init__(self) -> None:
        self.met = threading.Barrier(2, timeout=120)
        self.sent: list[Any] = [None, None]


class _Group:
    """What the exchange asks of a process group, for one of the two."""

    def __init__(self, wires: _Wires, rank: int) -> None:
        self._wires, self._rank = wires, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def give_and_take(self, rows: torch.Tensor, out: list[int], into: list[int]) -> torch.Tensor:
        self._wires.sent[self._rank] = rows.split(out)
        self._wires.met.wait()
        found = [self._wires.sent[rank][self._rank].clone() for rank in range(2)]
        self._wires.met.wait()
        assert [len(part) for part in found] == into
        return torch.cat(found)


class _Bridge:
    """One end of it; messages go one way."""

    def __init__(self, group: _Group, messages: "queue.Queue[Any]", told: list[str]) -> None:
        self.group, self._messages, self._told = group, messages, told

    def tell(self, message: Any) -> None:
        self._told.append(f"{type(message).__name__} {getattr(message, 'step', '')}".strip())
        self._messages.put(message)

    def hear(self) -> Any:
        return self._messages.get(timeout=120)


def _is_as_resident(folders: dict[str, str]) -> None:
    from megatron_tropd.convert.megatron_folder import open_model
    from megatron_tropd.losses import align
    from megatron_tropd.mcore import exchange, parallel
    from megatron_tropd.teacher._own_ranks import OwnRanks
    from megatron_tropd.teacher.separate import SeparateTeacher

    def swap(rows: Any, out: Any, into: Any, *, group: Any) -> Any:
        return group.give_and_take(rows, list(out), list(into))

    align.all_to_all_rows = exchange.all_to_all_rows = swap
    wires, messages = _Wires(), queue.Queue[Any]()
    told: list[str] = []
    bridges = [_Bridge(_Group(wires, rank), messages, told) for rank in range(2)]
    loss = preset("exopd")
    source = TeacherConfig(reference="student")
    pair = folders["student"], folders["teacher"]
    parts = build_parts(*pair, ParallelConfig(), TRAIN, loss, source=source)
    expected = _numbers(parts)
    apart = replace(source, placement="separate", ranks=1)
    config = config_of_parts(*pair, ParallelConfig(), TRAIN, loss, source=apart)
    opened = {"student": pair[0], "teacher": pair[1], "reference": pair[0]}
    models = {who: open_model(folder) for who, folder in opened.items()}
    failed: list[BaseException] = []

    def teach() -> None:
        try:
            ranks = OwnRanks(config, models, parts.layout, bridges[1])  # type: ignore[arg-type]
            ranks.serve(Progress(), lambda _: nullcontext())
        except BaseException as error:
            failed.append(error)
            wires.met.abort()
            raise

    parallel.bridge = lambda: bridges[0]  # type: ignore[assignment,return-value]
    thread = threading.Thread(target=teach)
    thread.start()
    teacher = SeparateTeacher(_start(parts, config))
    found = _numbers(replace(parts, teacher=teacher))
    assert _compare("separate", found, expected) < 1e-5
    assert told == ["Score 0", "Give 0", "Score 1", "Give 1"]
    _asked_ahead(teacher, parts, told)
    teacher.close()
    thread.join(60)
    assert not failed and not thread.is_alive()


def _asked_ahead(teacher: Any, parts: Any, told: list[str]) -> None:
    """The next step's samples are scored while the student trains, and told once."""
    from megatron_tropd.distill.step import learn

    told.clear()
    steps = [recorded_trajectories(number) for number in range(2)]
    there = threading.Event()

    def arrived(step: int) -> Any:
        there.set()
        return steps[step] if step < len(steps) else None

    teacher.look_ahead(arrived)
    parts = replace(parts, teacher=teacher)
    learn(parts, steps[0], 0)
    assert there.wait(60)
    while "Score 1" not in told:
        there.wait(0.01)
    learn(parts, steps[1], 1)
    assert told == ["Score 0", "Give 0", "Score 1", "Give 1"]


def test_both_worlds_make_the_step_of_one(tiny_model: Any):
    folders = {
        "student": str(tiny_model("llama", tie_word_embeddings=True, vocab_size=600)),
        "teacher": str(tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)),
    }
    run_with_env(1, _is_as_resident, folders)
