"""A cached teacher's losses and gradients are the resident one's, under every layout.

The scores go through files. They are made under one layout and read under it and under another.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config import ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import PRESETS, preset
from megatron_tropd.losses import TopKSignal
from megatron_tropd.losses.signals import methods_for
from tests.distributed.test_training import recorded_trajectories
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
}
OFFLOADED = {"pp2": "host", "cp2": "host_by_layer"}
"""Where the resident teacher's weights are; nowhere else: on the device."""
# So small a step that the weights stay, bit for bit: one student serves all comparisons.
TRAIN = TrainConfig(steps=9999, lr=1e-30, tokens_per_micro_batch=128)
TOP_K = 16
MASKED = tuple(range(40, 140))
"""Left out by one method: tokens that the files have."""
REFERENCED = ("delta", "erpd")
SHARDS = (recorded_trajectories(0, count=7), recorded_trajectories(1))
"""Seven rows are no multiple of two replicas."""
# Largest difference of a loss or a gradient norm, in parts of it.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


def _score(parts: Any, folder: Path, dtype: str) -> None:
    from megatron_tropd.distill.score import Scorer
    from megatron_tropd.teacher.cached.digest import num_scored
    from megatron_tropd.teacher.cached.files import (
        CacheHeader,
        shard_path,
        write_header,
        write_shard,
    )

    scorer = Scorer(parts.teacher, parts.layout, TOP_K, getattr(torch, dtype), 128)
    count = sum(map(len, SHARDS))
    names = ("t", None, "k", parts.vocab_size, "float32", TOP_K, dtype, "r", count)
    folder.mkdir(exist_ok=True)
    for number, sequences in enumerate(SHARDS):
        columns = scorer.score(sequences)
        if columns is not None:
            assert len(columns["logsumexp"]) == num_scored(sequences)
            write_header(folder, CacheHeader(*names, sum(map(num_scored, SHARDS)), len(SHARDS)))
            write_shard(shard_path(folder, number), sequences, columns)
    torch.distributed.barrier()


def numbers(parts: Any, method: str, step: int) -> dict[str, float]:
    from megatron_tropd.distill.step import learn

    settings: dict[str, Any] = {"top_k": TOP_K} if preset(method).needs.top_k else {}
    if method == "opd":
        settings["mask_first_ids"] = MASKED
    parts = replace(parts, loss=preset(method, **settings))
    # Eight of them: a step's rows are a multiple of the replicas.
    found = learn(parts, SHARDS[1] if step else [*SHARDS[0], SHARDS[1][0]], step).metrics
    names = ("loss", "grad_norm", "k1", "outlier_share", "acceptance")
    return {name: found[name] for name in names if found[name] is not None}


def compare(student: str, teacher: str, other: str, out: str) -> None:
    """Every layout of two ranks in one spawn."""
    import torch.distributed as dist

    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.mcore import platform
    from megatron_tropd.mcore.frozen import frozen_model
    from megatron_tropd.mcore.models import padded_vocab_size
    from megatron_tropd.teacher.cached import CachedTeacher
    from megatron_tropd.teacher.cached.files import TeacherCache
    from megatron_tropd.teacher.resident import ResidentTeacher

    dist.init_process_group(platform.distributed_backend())
    before: str | None = None
    worst: dict[str, float] = {}
    for layout, sizes in LAYOUTS.items():
        source = TeacherConfig(offload=OFFLOADED.get(layout, "none"))
        parts = build_parts(student, teacher, sizes, TRAIN, preset("opd"), source=source)
        # The teacher's reference: here another student.
        reference = frozen_model(
            HFFolder(Path(other)),
            layout=parts.layout,
            parallel=sizes,
            dtype=torch.float32,
            padded_vocab_size=padded_vocab_size(HFFolder(Path(other)).config, tensor=2),
            vocab_size=parts.vocab_size,
        )
        alone, both = parts.teacher, ResidentTeacher(*parts.teacher.scorers, reference)
        parts = replace(parts, teacher=both)
        for dtype in TOLERANCE:
            _score(parts, Path(out, f"{layout}-{dtype}"), dtype)
        methods = methods_for(TopKSignal) if layout == "tp2" else ["tropd", "entropy_opd"]
        cases = [(method, layout, "float32") for method in methods]
        cases += [(method, layout, "bfloat16") for method in ("tropd", "local_support")]
        cases += [(method, layout, "float32") for method in REFERENCED]
        cases += [("tropd", before, "float32")] if before else []
        for method, scored, dtype in cases:
            folder = Path(out, f"{scored}-{dtype}")
            referenced = method in REFERENCED
            parts = replace(parts, teacher=both if referenced else alone)
            read_from = CachedTeacher(TeacherCache(folder), referenced=referenced)
            cached = replace(parts, teacher=read_from)
            for step in range(2):
                resident = numbers(parts, method, step)
                read = numbers(cached, method, step)
                assert resident.keys() == read.keys()
                for name, value in resident.items():
                    assert read[name] == pytest.approx(
                        value, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype] / 10
                    ), (layout, method, dtype, step, name)
                    worst[dtype] = max(
                        worst.get(dtype, 0.0), abs(read[name] - value) / max(abs(value), 0.1)
                    )
                assert resident["grad_norm"] > 0
        before = layout
        leave_layout()
    print({dtype: f"{value:.1e}" for dtype, value in worst.items()})


def test_losses_and_gradients_are_those_of_the_resident_teacher(tmp_path: Path, tiny_model: Any):
    student = tiny_model("llama", tie_word_embeddings=True)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    other = tiny_model("llama", tie_word_embeddings=True, seed=9)
    run_with_env(2, compare, str(student), str(teacher), str(other), str(tmp_path))


def test_what_works_with_the_most_likely_ids_is_known():
    named = methods_for(TopKSignal)
    assert {"tropd", "opd", "entropy_opd", "local_support", "top_d", "reopold"} <= set(named)
    assert not {"gkd_jsd", "trb", "eopd", "tropd_exact", "exopd"} & set(named)
    assert set(named) < set(PRESETS)
