"""Checkpoints: complete or invisible, the same weights under another layout, bit-equal training.

Two spawns: a world of four writes under one layout and reads under others; a world of one is used
for the faults.
"""

import json
import resource
from pathlib import Path

import pytest
import torch
from test_training import TRAIN, recorded_trajectories

from megatron_tropd.config import ParallelConfig
from megatron_tropd.data.packing import pack
from megatron_tropd.errors import InputError, TrainingError
from tests.ranks import leave_layout, run_with_env


def _student(folder: str, layout: ParallelConfig, dtype: str = "float32"):
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.step import Student

    ranks = parallel.initialize(layout, seed=1)
    source = HFFolder(Path(folder))
    padded = models.padded_vocab_size(source.config, tensor=layout.tensor)
    kind = models.resolve_dtype(dtype)
    model = models.build_model(
        source, ranks=ranks, parallel=layout, dtype=kind, padded_vocab_size=padded
    )
    learner = Student(model, train=TRAIN, parallel=layout, ranks=ranks, dtype=kind)
    return learner, ranks


def _checkpoints(folder: Path, ranks, layout: ParallelConfig, keep: int = 2):
    from megatron_tropd.mcore.checkpoint import Checkpoints

    return Checkpoints(
        folder, keep=keep, ranks=ranks, distributed_optimizer=layout.distributed_optimizer
    )


def _some_steps(learner, ranks, first: int, last: int) -> list[float]:
    from megatron_tropd.mcore.step import cross_entropy

    norms = []
    for step in range(first, last):
        batches = pack(
            recorded_trajectories(step),
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            tokens_per_micro_batch=128,
            pad_multiple=2,
            seed=0,
            step=step,
        )
        norms.append(learner.train_step(batches, cross_entropy).grad_norm)
    return norms


def _layouts(distributed_optimizer: bool) -> dict[str, ParallelConfig]:
    """Layouts of four ranks; the first writes, all of them read."""
    option = {"distributed_optimizer": distributed_optimizer}
    if distributed_optimizer:
        return {
            "tp2_dp2": ParallelConfig(tensor=2, data=2, **option),
            "dp4": ParallelConfig(data=4, **option),
            "pp2_dp2": ParallelConfig(pipeline=2, data=2, **option),
        }
    return {
        "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
        "tp4": ParallelConfig(tensor=4),
        "pp2_dp2": ParallelConfig(pipeline=2, data=2),
    }


def _save_and_move(folder: str, out: str, dtype: str, distributed_optimizer: bool) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    root = Path(out, f"{dtype}-{distributed_optimizer}")
    layouts = _layouts(distributed_optimizer)
    writer = next(iter(layouts.values()))
    learner, ranks = _student(folder, writer, dtype)
    _some_steps(learner, ranks, 0, 3)
    _checkpoints(root, ranks, writer).save(learner, step=3, extra={"step": 3})
    after = {"uninterrupted": _some_steps(learner, ranks, 3, 6)}
    leave_layout()
    for name, layout in layouts.items():
        learner, ranks = _student(folder, layout, dtype)
        extra = _checkpoints(root, ranks, layout).load(learner, 3)
        assert extra["step"] == 3
        after[name] = _some_steps(learner, ranks, 3, 6)
        leave_layout()
    if dist.get_rank() == 0:
        (root / "after.json").write_text(json.dumps(after))


CASES = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]


def _all_cases(folder: str, out: str) -> None:
    for dtype, distributed_optimizer in CASES:
        _save_and_move(folder, out, dtype, distributed_optimizer)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, tiny_model) -> Path:
    """Folder with what every case did after its checkpoint."""
    model = tiny_model("llama", tie_word_embeddings=True, num_key_value_heads=4)
    out = tmp_path_factory.mktemp("moved")
    run_with_env(4, _all_cases, str(model), str(out))
    return out


@pytest.mark.parametrize(("dtype", "distributed_optimizer"), CASES)
def test_a_checkpoint_continues_under_other_layouts(dtype, distributed_optimizer, moved):
    after = json.loads((moved / f"{dtype}-{distributed_optimizer}" / "after.json").read_text())
    expected = after.pop("uninterrupted")
    same_layout = next(iter(after))
    assert after[same_layout] == expected, "the layout that wrote it continues bit for bit"
    rtol = 1e-4 if dtype == "float32" else 0.05
    for norms in after.values():
        torch.testing.assert_close(norms, expected, rtol=rtol, atol=1e-4)


def _faults(folder: str, out: str) -> None:
    layout, root = ParallelConfig(), Path(out)
    learner, ranks = _student(folder, layout)
    checkpoints = _checkpoints(root, ranks, layout)
    for step in (1, 2, 3):
        _some_steps(learner, ranks, step - 1, step)
        checkpoints.save(learner, step=step, extra={"step": step})
    assert checkpoints.steps() == [2, 3], "the two newest are kept"

    # A save cut short leaves a name with a dot, which nobody takes for a checkpoint.
    (root / ".step_000004.tmp").mkdir()
    assert checkpoints.steps() == [2, 3]

    # No room: every file over 64 KiB fails, as on a full disk.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, unlimited[1]))
    try:
        with pytest.raises(TrainingError, match="step 3 is intact"):
            checkpoints.save(learner, step=5, extra={"step": 5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoints.steps() == [2, 3]
    assert not list(root.glob(".step_000005*"))
    assert checkpoints.load(learner, 3)["step"] == 3

    damaged = next((root / "step_000003").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read.*Remove that folder"):
        checkpoints.load(learner, 3)
    assert checkpoints.load(learner, 2)["step"] == 2


def test_faults_leave_the_older_checkpoints_intact(tmp_path, tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True, num_key_value_heads=4)
    run_with_env(1, _faults, str(model), str(tmp_path / "checkpoints"))
