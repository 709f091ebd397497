"""A teacher on ranks of its own gives the losses and gradients of one on the student's ranks.

Student ranks and teacher ranks of one job; on the student's the same steps are made with a resident
teacher in the student's layout, then with the one on the other ranks.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.config import ModelParallelConfig, ParallelConfig, TeacherConfig
from megatron_tropd.config.loss import preset
from tests.distributed.test_other_layout import (
    STUDENTS,
    TEACHERS,
    TRAIN,
    _compare,
    _numbers,
    _start,
)
from tests.ranks import run_with_env
from tests.step_parts import build_parts, config_of_parts

Own = ModelParallelConfig


@dataclass(frozen=True)
class Case:
    """A student in its layout, and its teacher on the other ranks."""

    layout: ParallelConfig
    student: str
    teacher: str
    own: Own
    ranks: int
    losses: tuple[str, ...] = ("tropd_exact",)
    offload: Any = "none"


_TP2, _DP2 = ParallelConfig(tensor=2), ParallelConfig(data=2)
_SP = dict(tensor=2, sequence_parallel=True)
FOUR = [
    Case(_TP2, "wider", "plain", Own(tensor=2), 2, ("tropd_exact", "eopd", "exopd")),
    Case(_TP2, "wider", "plain", Own(context=2), 2),
    Case(_DP2, "same", "mixture", Own(expert=2), 2),
    Case(_DP2, "same", "tied", Own(pipeline=2), 2, ("tropd_exact", "tropd")),
    Case(_DP2, "same", "plain", Own(), 2, offload="host"),
    Case(ParallelConfig(pipeline=2), "same", "plain", Own(**_SP), 2),
    Case(ParallelConfig(context=2), "same", "plain", Own(pipeline=2), 2),
    Case(ParallelConfig(), "same", "plain", Own(), 3),
]
THREE = [
    Case(_TP2, "same", "plain", Own(), 1, ("tropd_exact", "exopd")),
    Case(ParallelConfig(), "wider", "plain", Own(tensor=2), 2),
]


def _run(case: Case, folders: dict[str, str], worst: dict[str, float]) -> None:
    from megatron_tropd.mcore import parallel, platform
    from megatron_tropd.mcore.bridge import Worlds

    worlds, rank = Worlds(case.layout.world_size, case.ranks), _rank()
    here = case.layout if rank < worlds.students else case.own.over(case.ranks)
    platform.prepare_platform()
    ranks = parallel.initialize(here, seed=1, worlds=worlds, timeout_seconds=120)
    parts = None
    for name in case.losses:
        loss = preset(name)
        source = TeacherConfig(reference="student" if loss.needs.reference else None)
        apart = replace(
            source, placement="separate", ranks=case.ranks, parallel=case.own, offload=case.offload
        )
        pair = folders[case.student], folders[case.teacher]
        config = config_of_parts(*pair, case.layout, TRAIN, loss, source=apart)
        if rank >= worlds.students:
            _teach(config, ranks)
            continue
        parts = build_parts(*pair, case.layout, TRAIN, loss, source=source, ranks=ranks)
        expected = _numbers(parts)
        from megatron_tropd.teacher import load_teacher

        teacher = load_teacher("separate")(_start(parts, config))
        worst[str(case)] = _compare(case, _numbers(replace(parts, teacher=teacher)), expected)
        teacher.close()
    parallel.shutdown()


def _teach(config: Any, layout: Any) -> None:
    """Be a rank of the teacher's."""
    from megatron_tropd.base.progress import Progress
    from megatron_tropd.convert.megatron_folder import open_model
    from megatron_tropd.mcore import parallel
    from megatron_tropd.teacher._own_ranks import OwnRanks

    folders = {"student": config.model.student, "teacher": config.model.teacher}
    folders |= {"reference": config.reference} if config.reference else {}
    opened = {who: open_model(folder) for who, folder in folders.items()}
    ranks = OwnRanks(config, opened, layout, parallel.bridge())
    ranks.serve(Progress(), lambda _: nullcontext())


def _rank() -> int:
    from megatron_tropd.base.environment import number

    return number("RANK")


def compare(cases: list[Case], folders: dict[str, str]) -> None:
    """All jobs of as many ranks, in one spawn."""
    worst: dict[str, float] = {}
    for case in cases:
        _run(case, folders, worst)
    if _rank() == 0:
        print(f"\nlargest difference: {max(worst.values()):.1e}")


def _folders(tiny_model: Any) -> dict[str, str]:
    folders = {name: str(tiny_model("llama", **more)) for name, more in STUDENTS.items()}
    return folders | {
        name: str(tiny_model(kind, **more)) for name, (kind, more) in TEACHERS.items()
    }


def test_losses_and_gradients_are_those_of_a_resident_teacher(tiny_model: Any):
    run_with_env(4, compare, FOUR, _folders(tiny_model))


def test_three_ranks_two_of_them_the_students_or_the_teachers(tiny_model: Any):
    run_with_env(3, compare, THREE, _folders(tiny_model))
