"""A teacher in a layout of its own gives the losses and gradients of one in the student's layout.

One spawn of four ranks: a student in each of its layouts, with its teacher in the same one, then
with teachers in others. Nothing else changes between the two.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.config import (
    Config,
    ModelParallelConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
)
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


@dataclass(frozen=True)
class Case:
    """A student in its layout, and its teacher in others."""

    layout: ParallelConfig
    student: str
    teacher: str
    own: tuple[Own, ...]
    loss: str = "tropd_exact"
    offload: Any = "none"
    read_from: str | None = None
    """Another folder of the same teacher; None: its own."""


_TP2_DP2 = ParallelConfig(tensor=2, data=2)
_SP = dict(tensor=2, sequence_parallel=True)
CASES = [
    Case(
        _TP2_DP2,
        "wider",
        "plain",
        (
            Own(),
            Own(tensor=4),
            Own(pipeline=2),
            Own(tensor=2, pipeline=2),
            Own(pipeline=4),
            Own(context=2),
            Own(context=2, **_SP),
        ),
    ),
    Case(_TP2_DP2, "same", "tied", (Own(pipeline=2), Own(context=4))),
    Case(_TP2_DP2, "same", "plain", (Own(pipeline=2),), offload="host"),
    Case(_TP2_DP2, "same", "plain", (Own(tensor=4),), read_from="checkpoint"),
    Case(_TP2_DP2, "same", "plain", (Own(pipeline=2), Own(context=2)), loss="exopd"),
    Case(ParallelConfig(pipeline=2, data=2), "same", "plain", (Own(), Own(tensor=4))),
    Case(ParallelConfig(context=2, **_SP), "same", "plain", (Own(), Own(context=2, pipeline=2))),
    Case(ParallelConfig(data=4), "same", "mixture", (Own(expert=2), Own(expert=2, **_SP))),
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


def _start(parts: Any, config: Config) -> Any:
    """What a teacher is made of beside the student of ``parts``."""
    from megatron_tropd.convert.megatron_folder import open_model
    from megatron_tropd.teacher import TeacherStart

    return TeacherStart(
        config,
        open_model(config.model.teacher),
        parts.layout,
        torch.float32,
        parts.student.module.vocab_size,
        parts.vocab_size,
        open_model(config.reference) if config.reference else None,
    )


def _run(case: Case, folders: dict[str, str], worst: dict[str, float]) -> None:
    """One student with its teacher in every layout."""
    from megatron_tropd.teacher import load_teacher

    pair = folders[case.student], folders[case.teacher]
    loss = preset(case.loss)
    source = TeacherConfig(reference="student" if loss.needs.reference else None)
    parts = build_parts(*pair, case.layout, TRAIN, loss, source=source)
    expected = _numbers(parts)
    read_from = folders[case.read_from or case.teacher]
    for own in case.own:
        other = replace(source, parallel=own, offload=case.offload)
        config = config_of_parts(pair[0], read_from, case.layout, TRAIN, loss, source=other)
        teacher = load_teacher("resident")(_start(parts, config))
        name = f"{case} {own}"
        worst[name] = _compare(name, _numbers(replace(parts, teacher=teacher)), expected)


def compare(folders: dict[str, str]) -> None:
    """Every layout of four ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.mcore import platform

    dist.init_process_group(platform.distributed_backend())
    worst: dict[str, float] = {}
    for case in CASES:
        _run(case, folders, worst)
        leave_layout()
    if dist.get_rank() == 0:
        print(f"\nlargest difference: {max(worst.values()):.1e}")


def test_losses_and_gradients_are_those_of_a_teacher_in_the_students_layout(
    tiny_model: Any, tmp_path: Path
):
    from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

    folders = {name: str(tiny_model("llama", **more)) for name, more in STUDENTS.items()}
    folders |= {name: str(tiny_model(kind, **more)) for name, (kind, more) in TEACHERS.items()}
    hf_to_megatron(ToMegatron(Path(folders["plain"]), tmp_path / "megatron", tensor_parallel=2))
    folders["checkpoint"] = str(tmp_path / "megatron")
    run_with_env(4, compare, folders)
