"""A teacher in a layout of its own gives the losses and gradients of one in the student's layout.

One spawn of four ranks: a student in each of its layouts, with its teacher in the same one, then
with teachers in others. Nothing else changes between the two.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.config import ModelParallelConfig, ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import preset
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts, config_of_parts

# So small a step that the weights stay, bit for bit: one student serves all comparisons.
TRAIN = TrainConfig(steps=9999, lr=1e-30, tokens_per_micro_batch=64)
TOLERANCE = 1e-5
Own = ModelParallelConfig
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", dict(hidden_size=96, num_hidden_layers=4, num_key_value_heads=4, seed=5)),
    "tied": ("llama", dict(num_hidden_layers=4, tie_word_embeddings=True, seed=6)),
    "mixture": ("qwen3_moe", dict(num_hidden_layers=2, seed=7)),
}
STUDENTS: dict[str, dict[str, Any]] = {
    "wider": dict(tie_word_embeddings=True, vocab_size=600),  # 640 columns, the teacher 320
    "same": dict(seed=3),
}
# Student's layout -> student, teacher, and layouts of the teacher.
CASES: list[tuple[ParallelConfig, str, str, list[Own]]] = [
    (
        ParallelConfig(tensor=2, data=2),
        "wider",
        "plain",
        [
            Own(),
            Own(tensor=4),
            Own(pipeline=2),
            Own(tensor=2, pipeline=2),
            Own(pipeline=4),
            Own(context=2),
            Own(tensor=2, context=2, sequence_parallel=True),
        ],
    ),
    (ParallelConfig(tensor=2, data=2), "same", "tied", [Own(pipeline=2), Own(context=4)]),
    (ParallelConfig(pipeline=2, data=2), "same", "plain", [Own(), Own(tensor=4)]),
    (
        ParallelConfig(tensor=2, context=2, sequence_parallel=True),
        "same",
        "plain",
        [Own(), Own(context=2, pipeline=2)],
    ),
    (
        ParallelConfig(data=4),
        "same",
        "mixture",
        [Own(expert=2), Own(tensor=2, expert=2, sequence_parallel=True)],
    ),
]


def _numbers(parts: Any) -> dict[str, torch.Tensor]:
    """Losses, gradient norms and gradients of two steps; the second has an odd share of rows."""
    from megatron_tropd.distill.step import learn

    found = {}
    dp_size = parts.layout.dp_size
    for step, sequences in enumerate((recorded_trajectories(0), recorded_trajectories(1, 4 + 2))):
        sequences = sequences[: len(sequences) // dp_size * dp_size]
        metrics = learn(parts, sequences, step).metrics
        found |= {f"{step} {n}": torch.tensor(metrics[n]) for n in ("loss", "grad_norm", "k1")}
        found |= {
            f"{step} {name}": parameter.main_grad.clone()
            for name, parameter in parts.student.module.named_parameters()
        }
    assert found["0 grad_norm"] > 0
    return found


def _compare(case: Any, found: dict[str, Any], expected: dict[str, Any]) -> float:
    worst = 0.0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1e-3)
        off = float((found[name] - value).abs().max() / scale)
        assert off < TOLERANCE, (case, name, off)
        worst = max(worst, off)
    return worst


def _start(parts: Any, student: str, teacher: str, layout: ParallelConfig) -> Any:
    """What a teacher is made of beside the student of ``parts``."""
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.teacher import TeacherStart

    return TeacherStart(
        config_of_parts(student, teacher, layout, TRAIN, parts.loss),
        HFFolder(Path(teacher)),
        parts.layout,
        torch.float32,
        parts.student.module.vocab_size,
        parts.vocab_size,
    )


def _other(parts: Any, start: Any, **teacher: Any) -> Any:
    """The same step with another teacher."""
    from megatron_tropd.teacher import load_teacher

    source = TeacherConfig(reference=start.config.teacher.reference, **teacher)
    start = replace(start, config=replace(start.config, teacher=source))
    return replace(parts, teacher=load_teacher("resident")(start))


def compare(students: dict[str, str], teachers: dict[str, str]) -> None:
    """Every layout of four ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.mcore import platform

    dist.init_process_group(platform.distributed_backend())
    worst: dict[str, float] = {}
    for layout, student, teacher, own in CASES:
        pair = students[student], teachers[teacher]
        parts = build_parts(*pair, layout, TRAIN, preset("tropd_exact"))
        start = _start(parts, *pair, layout)
        expected = _numbers(parts)
        for parallel in own:
            other = _other(parts, start, parallel=parallel)
            case = f"{layout} {parallel}"
            worst[case] = _compare(case, _numbers(other), expected)
        leave_layout()
    print({case: f"{value:.1e}" for case, value in worst.items()})


def test_losses_and_gradients_are_those_of_a_teacher_in_the_students_layout(tiny_model: Any):
    students = {name: str(tiny_model("llama", **more)) for name, more in STUDENTS.items()}
    teachers = {name: str(tiny_model(kind, **more)) for name, (kind, more) in TEACHERS.items()}
    run_with_env(4, compare, students, teachers)
