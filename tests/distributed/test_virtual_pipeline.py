"""Virtual pipeline stages change no number: losses, gradients, checkpoints, adapters, scores.

Student and teacher differ in family, width, depth and tying; neither depth is a multiple of the
chunks of four stages. One spawn of four ranks.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import _checkpoints, _saved, _some_steps, _student
from test_lora import lora_student
from test_lora import steps as lora_steps
from test_training import METHODS, TRAIN, trajectories_of

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import MegatronConfig, ParallelConfig, TeacherConfig
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

STEPS = {"tropd": 3, "reopold": 4}
"""The second one looks at the whole batch first, and selects from the fourth step on."""
PP2_DP2 = ParallelConfig(pipeline=2, data=2, distributed_optimizer=True, uneven_stages=True)
VPP2_DP2 = replace(PP2_DP2, virtual_pipeline=2)
LAYOUTS = {
    "dp4": ParallelConfig(data=4),
    "pp2_vpp2_dp2": VPP2_DP2,
    "tp2_sp_pp2_vpp2": ParallelConfig(
        tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, uneven_stages=True
    ),
    "cp2_pp2_vpp2": ParallelConfig(context=2, pipeline=2, virtual_pipeline=2, uneven_stages=True),
    "pp4_vpp2": ParallelConfig(pipeline=4, virtual_pipeline=2, uneven_stages=True),
}
CASES = [
    ("dp4", "tropd"),
    ("dp4", "reopold"),
    ("pp2_vpp2_dp2", "reopold"),
    ("tp2_sp_pp2_vpp2", "tropd"),
    ("cp2_pp2_vpp2", "tropd"),
    ("pp4_vpp2", "tropd"),
]
OPTIONS = MegatronConfig(
    ddp={"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000},
    model={
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)
HOSTED = {"host": ("pp2_vpp2_dp2", "reopold"), "host_by_layer": ("pp4_vpp2", "tropd")}
"""Where a teacher is -> the case that is run once more. In PP 4 some chunks have one layer, which
is then the next one, too."""
SHOWN = ("grad_norm", "loss", "tv", "reverse_kl", "selected_share", "tokens_student")
READERS = {
    "same": VPP2_DP2,
    "without": PP2_DP2,
    "three": replace(VPP2_DP2, virtual_pipeline=3),
    "tp2": ParallelConfig(tensor=2, data=2, distributed_optimizer=True),
}


def _everything(student: str, teacher: str, mixture: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found: dict[str, Any] = {
        f"{layout}-{method}": _train(student, teacher, LAYOUTS[layout], method)
        for layout, method in CASES
    }
    found["options"] = _train(student, teacher, VPP2_DP2, "reopold", megatron=OPTIONS)
    for kind, (layout, method) in HOSTED.items():
        source = TeacherConfig(offload=kind)
        found[kind] = _train(student, teacher, LAYOUTS[layout], method, source=source)
    found["moved"] = _move(student, VPP2_DP2, READERS, Path(out, "moved"))
    found["moved back"] = _move(student, PP2_DP2, {"back": VPP2_DP2}, Path(out, "back"))
    _refuse_other_slices(student, Path(out, "slices"))
    found["lora"] = _adapters(student, Path(out, "lora"))
    found["mixture"] = _mixture(mixture)
    if dist.get_rank() == 0:
        Path(out, "found.json").write_text(json.dumps(found))


def _train(
    student: str, teacher: str, layout: ParallelConfig, method: str, **options: Any
) -> list[list[float]]:
    from megatron_tropd.distill.step import learn

    parts = build_parts(
        student,
        teacher,
        layout,
        TRAIN,
        METHODS[method],
        pad_multiple=layout.tensor if layout.context == 1 else layout.row_shards,
        **options,
    )
    history = []
    for step in range(STEPS[method]):
        metrics = learn(parts, trajectories_of(method, step), step).metrics
        history.append([metrics[name] for name in SHOWN])
    leave_layout()
    return history


def _move(
    folder: str, writer: ParallelConfig, readers: dict[str, ParallelConfig], out: Path
) -> dict[str, list[float]]:
    """Save under one layout, resume under others: the gradient norms that follow."""
    learner, ranks = _student(folder, writer)
    _some_steps(learner, ranks, 0, 2)
    _saved(_checkpoints(out, ranks, writer), learner, 2)
    after = {"uninterrupted": _some_steps(learner, ranks, 2, 4)}
    leave_layout()
    for name, layout in readers.items():
        learner, ranks = _student(folder, layout)
        _checkpoints(out, ranks, layout).load(learner, 2)
        after[name] = _some_steps(learner, ranks, 2, 4)
        leave_layout()
    return after


def _refuse_other_slices(folder: str, out: Path) -> None:
    """Slices of the buffers as they lie are read by the same chunks alone."""
    learner, ranks = _student(folder, VPP2_DP2)
    _some_steps(learner, ranks, 0, 1)
    _saved(_checkpoints(out, ranks, VPP2_DP2), learner, 1, sharding="dp_reshardable")
    expected = _some_steps(learner, ranks, 1, 2)
    leave_layout()
    learner, ranks = _student(folder, VPP2_DP2)
    _checkpoints(out, ranks, VPP2_DP2).load(learner, 1)
    assert _some_steps(learner, ranks, 1, 2) == expected
    leave_layout()
    learner, ranks = _student(folder, PP2_DP2)
    with pytest.raises(ConfigError, match=r"parallel\.virtual_pipeline was 2, is 1"):
        _checkpoints(out, ranks, PP2_DP2).load(learner, 1)
    leave_layout()


def _adapters(folder: str, out: Path) -> dict[str, list[float]]:
    """Norms of adapters' gradients: of replicas, of chunks, and resumed without chunks."""
    found, plain = {}, ParallelConfig(data=4, distributed_optimizer=True)
    learner, ranks = lora_student(folder, plain)
    found["dp4"] = lora_steps(learner, ranks, 0, 4)
    leave_layout()
    learner, ranks = lora_student(folder, VPP2_DP2)
    found["chunks"] = lora_steps(learner, ranks, 0, 2)
    _saved(_checkpoints(out, ranks, VPP2_DP2), learner, 2)
    leave_layout()
    learner, ranks = lora_student(folder, PP2_DP2, drawn=False)
    _checkpoints(out, ranks, PP2_DP2).load(learner, 2)
    found["chunks"] += lora_steps(learner, ranks, 2, 4)
    leave_layout()
    return found


def _mixture(folder: str) -> dict[str, list[float]]:
    """Norms of a mixture's gradients, whose experts are shared by the replicas."""
    found = {}
    for name, layout in {
        "without": ParallelConfig(data=4, expert=2),
        "chunks": ParallelConfig(pipeline=2, virtual_pipeline=2, data=2, expert=2),
    }.items():
        learner, ranks = _student(folder, layout)
        found[name] = _some_steps(learner, ranks, 0, 3)
        leave_layout()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model) -> dict[str, Any]:
    """A tied Llama student of 9 layers and an untied, wider Qwen3 teacher of 10."""
    student = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=9)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=10, seed=5)
    mixture = tiny_model("qwen3_moe", num_hidden_layers=4)
    out = tmp_path_factory.mktemp("virtual")
    run_with_env(4, _everything, str(student), str(teacher), str(mixture), str(out))
    return json.loads((out / "found.json").read_text())


def _close(found: Any, expected: Any, atol: float = 1e-6) -> None:
    one, other = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=atol, equal_nan=True)


@pytest.mark.parametrize(("layout", "method"), [case for case in CASES if case[0] != "dp4"])
def test_losses_and_grad_norms_are_those_without(layout, method, found) -> None:
    atol = 1e-6 if method == "tropd" else 1e-5
    _close(found[f"{layout}-{method}"], found[f"dp4-{method}"], atol)


def test_overlapped_reductions_and_recomputation_change_nothing(found) -> None:
    _close(found["options"], found["pp2_vpp2_dp2-reopold"], 1e-5)


@pytest.mark.parametrize("kind", HOSTED)
def test_a_teacher_in_host_memory_scores_bit_for_bit(kind, found) -> None:
    assert found[kind] == found["-".join(HOSTED[kind])]


def test_a_checkpoint_moves_between_chunks(found) -> None:
    expected = found["moved"].pop("uninterrupted")
    assert found["moved"].pop("same") == expected
    for norms in found["moved"].values():
        _close(norms, expected, 1e-4)
    back = found["moved back"]
    _close(back["back"], back["uninterrupted"], 1e-4)


def test_adapters_of_chunks_train_and_move(found) -> None:
    _close(found["lora"]["chunks"], found["lora"]["dp4"])


def test_experts_of_chunks_train_alike(found) -> None:
    _close(found["mixture"]["chunks"], found["mixture"]["without"])
