"""Checkpoints: complete or invisible, the same weights under another layout, bit-equal training.

Two spawns: a world of four writes under one layout and reads under others; a world of one is used
for the faults.
"""

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import TRAIN, recorded_trajectories

from megatron_tropd.base import files
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.config import MegatronConfig, ParallelConfig
from megatron_tropd.data.packing import pack
from tests.ranks import leave_layout, run_with_env


def _student(
    folder: str,
    layout: ParallelConfig,
    dtype: str = "float32",
    *,
    ddp: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    change: Callable[[Any], None] = lambda _: None,
    **options,
):
    """A learner and its rank.

    ``ddp``, ``optimizer``: options of Megatron's; ``change``: what to do to the model before it is
    wrapped.
    """
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.student import Student

    ranks = parallel.initialize(layout, seed=1, **options)
    source = HFFolder(Path(folder))
    padded = models.padded_vocab_size(source.config, tensor=layout.tensor)
    kind = models.resolve_dtype(dtype)
    model = models.build_model(
        source, layout=ranks, parallel=layout, dtype=kind, padded_vocab_size=padded
    )
    change(model.module)
    learner = Student(
        model,
        train=TRAIN,
        parallel=layout,
        dtype=kind,
        megatron=MegatronConfig(ddp=ddp or {}, optimizer=optimizer or {}),
    )
    return learner, ranks


def _checkpoints(folder: Path, ranks, layout: ParallelConfig, keep: int = 2, say=print):
    from megatron_tropd.mcore.checkpoint import Checkpoints

    return Checkpoints(
        folder, keep=keep, layout=ranks, distributed_optimizer=layout.distributed_optimizer, say=say
    )


def _some_steps(learner, ranks, first: int, last: int) -> list[float]:
    from megatron_tropd.mcore.schedule import cross_entropy

    norms = []
    for step in range(first, last):
        batches = pack(
            recorded_trajectories(step),
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            tokens_per_micro_batch=128,
            pad_multiple=4,
            batch_multiple=ranks.batch_multiple,
            seed=0,
            step=step,
        )
        batches = [ranks.local(batch) for batch in batches]
        learner.forward_backward(batches, cross_entropy)
        norms.append(learner.update().grad_norm)
    return norms


def _layouts(distributed_optimizer: bool) -> dict[str, ParallelConfig]:
    """Layouts of four ranks; the first writes, all of them read."""
    option = {"distributed_optimizer": distributed_optimizer}
    if distributed_optimizer:
        return {
            "tp2_dp2": ParallelConfig(tensor=2, data=2, **option),
            "dp4": ParallelConfig(data=4, **option),
            "pp2_dp2": ParallelConfig(pipeline=2, data=2, **option),
            "cp2_dp2": ParallelConfig(context=2, data=2, **option),
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
    checkpoints = _checkpoints(root, ranks, writer)
    checkpoints.save(learner, step=3, extra={"step": 3})
    # Training goes on while the files are written: what was true at step 3 must be in them.
    after = {"uninterrupted": _some_steps(learner, ranks, 3, 6)}
    checkpoints.wait()
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
    _one_rank_cannot_read(folder, Path(out, "float32-False"))


UNREADABLE = "/proc/self/mem"
"""Linux answers EIO to whoever reads its first byte."""


def _one_rank_cannot_read(folder: str, root: Path) -> None:
    """The file system fails one rank, with checksums or without: all stop, nobody falls back."""
    import torch.distributed as dist

    files.READ_PATIENCE = (0.0,)
    layout = _layouts(False)["tp2_pp2"]
    learner, ranks = _student(folder, layout)
    checkpoints = _checkpoints(root, ranks, layout)
    path = root / "step_000003"
    if ranks.is_main:
        shutil.copytree(path, root / "step_000002")
        # What the last rank wrote, only the last rank reads.
        _unreadable(path / "__3_0.distcp")
    dist.barrier()
    for unchecked in (False, True):
        if unchecked and ranks.is_main:
            (path / "checksums.json").unlink()
        dist.barrier()
        with pytest.raises(TrainingError, match=r"Errno 5.*may be intact") as caught:
            checkpoints.load_newest(learner)
        assert caught.value.kind == "disk" and checkpoints.steps() == [2, 3]
        dist.barrier()
    leave_layout()


def _unreadable(file: Path) -> bytes:
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(UNREADABLE)
    return content


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


TP2_DP2 = ParallelConfig(tensor=2, data=2, distributed_optimizer=True)


def _sharding_of(path: Path) -> str:
    from megatron_tropd.mcore.checkpoint import _saved_extra

    return _saved_extra(path)["sharding"]


def _bytes_of(buckets: list) -> int:
    return sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors)


def _save_slices(folder: str, out: str) -> None:
    import torch.distributed as dist

    from megatron_tropd.mcore import async_save
    from megatron_tropd.mcore.checkpoint import saving_bytes

    layout = ParallelConfig(data=2, distributed_optimizer=True)
    learner, ranks = _student(folder, layout)
    _some_steps(learner, ranks, 0, 3)
    checkpoints = _checkpoints(Path(out), ranks, layout)
    gathered, all_gather = [], dist.all_gather
    staged, stage = [], async_save._staged
    async_save._staged = lambda *a: (copies := stage(*a), staged.append(_bytes_of(copies)))[0]
    dist.all_gather = lambda parts, *_: (gathered.append(parts[0].numel()), all_gather(parts, *_))
    for sharding in ("fully_reshardable", "dp_reshardable"):
        gathered.clear()
        checkpoints.save(learner, step=3, extra={}, sharding=sharding)
        checkpoints.wait()
        if sharding == "fully_reshardable":
            parameters = sum(p.numel() for p in learner.module.parameters())
            assert parameters <= 2 * sum(gathered) / 3 < 1.01 * parameters
            taken = sum(gathered) * 2 * 4 + 4 * parameters
            assert saving_bytes(learner, ranks, sharding) == pytest.approx(taken, rel=0.01)
            shutil.rmtree(Path(out, "step_000003")) if ranks.is_main else None
            dist.barrier()
    assert not gathered, "every rank writes what it has"
    assert saving_bytes(learner, ranks, sharding) == pytest.approx(staged[-1], rel=0.01)
    uninterrupted = _some_steps(learner, ranks, 3, 6)
    _saved(checkpoints, learner, 6, sharding="dp_reshardable")
    _saved(checkpoints, learner, 6, sharding="dp_reshardable")
    assert _sharding_of(Path(out, "step_000006")) == "dp_reshardable"
    _saved(checkpoints, learner, 6)  # as a run that is stopped right after it has saved
    assert _sharding_of(Path(out, "step_000006")) == "fully_reshardable"
    assert [p.name for p in sorted(Path(out).glob("step_*"))] == ["step_000003", "step_000006"]
    if ranks.is_main:
        Path(out, "norms.json").write_text(json.dumps(uninterrupted))


def _read_slices(folder: str, out: str) -> None:
    import torch.distributed as dist

    world = int(os.environ["WORLD_SIZE"])
    expected = json.loads(Path(out, "norms.json").read_text())
    context = 2 if world == 4 else 1
    layout = ParallelConfig(context=context, data=world // context, distributed_optimizer=True)
    learner, ranks = _student(folder, layout)
    assert _checkpoints(Path(out), ranks, layout).load(learner, 3)["sharding"] == "dp_reshardable"
    norms = _some_steps(learner, ranks, 3, 6)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-4)
    assert norms == expected or world != 2, "the layout that wrote it continues bit for bit"
    if world < 4:
        return
    dist.barrier()
    leave_layout()
    learner, ranks = _student(folder, TP2_DP2)
    checkpoints = _checkpoints(Path(out), ranks, TP2_DP2)
    with pytest.raises(ConfigError, match=r"dp_reshardable.*: parallel.tensor was 1, is 2\."):
        checkpoints.load(learner, 3)
    assert checkpoints.load_newest(learner) is not None, "of step 6, when the run was stopped"
    shutil.rmtree(Path(out, "step_000006"), ignore_errors=True)
    dist.barrier()
    with pytest.raises(ConfigError, match=r"parallel\.data and parallel\.context may"):
        checkpoints.load_newest(learner)
    assert checkpoints.steps() == [3], "it is not damaged"


def test_a_checkpoint_of_slices_gathers_nothing_and_loads_under_other_replicas(
    tmp_path, tiny_model
):
    model = tiny_model("llama", tie_word_embeddings=True, num_key_value_heads=4)
    run_with_env(2, _save_slices, str(model), str(tmp_path))
    for world in (2, 1, 4):
        run_with_env(world, _read_slices, str(model), str(tmp_path))


def _attention_last(model) -> None:
    """Other layers list the same parameters in another order, as Transformer Engine's do."""
    for layer in model.decoder.layers:
        layer._modules["self_attention"] = layer._modules.pop("self_attention")


def _cut_otherwise(folder: str, mixture: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    spread = {"data": 2, "distributed_optimizer": True}
    layout, root = ParallelConfig(**spread), Path(out, "dense")
    learner, ranks = _student(folder, layout)
    _some_steps(learner, ranks, 0, 2)
    _saved(_checkpoints(root, ranks, layout), learner, 2, sharding="dp_reshardable")
    uninterrupted = _some_steps(learner, ranks, 2, 4)
    # One bucket holds this model with overlap and without; padding follows after the last slice.
    for ddp in ({"pad_buckets_for_high_nccl_busbw": True}, {"overlap_grad_reduce": True}):
        leave_layout()
        learner, ranks = _student(folder, layout, ddp=ddp)
        _checkpoints(root, ranks, layout).load(learner, 2)
        torch.testing.assert_close(
            _some_steps(learner, ranks, 2, 4), uninterrupted, rtol=1e-5, atol=1e-5
        )
    others: list[tuple[dict[str, Any], str]] = [
        ({"change": _attention_last}, "other layers"),
        (
            {"ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}},
            r"megatron\.ddp\.bucket_size was None, is 5000",
        ),
    ]
    for how, said in others:
        leave_layout()
        learner, ranks = _student(folder, layout, **how)
        with pytest.raises(ConfigError, match=said):
            _checkpoints(root, ranks, layout).load_newest(learner)
        assert _checkpoints(root, ranks, layout).steps() == [2], "it is not damaged"
    leave_layout()
    layout = ParallelConfig(tensor=2, sequence_parallel=True, distributed_optimizer=True)
    root = Path(out, "mixture")
    learner, ranks = _student(mixture, layout)
    _saved(_checkpoints(root, ranks, layout), learner, 2, sharding="dp_reshardable")
    leave_layout()
    learner, ranks = _student(mixture, replace(layout, expert_tensor=1))
    with pytest.raises(ConfigError, match=r"parallel\.expert_tensor was 2, is 1"):
        _checkpoints(root, ranks, layout).load_newest(learner)


def test_slices_of_other_buffers_are_refused_by_name(tmp_path, tiny_model):
    model = tiny_model("llama", num_key_value_heads=4)
    run_with_env(2, _cut_otherwise, str(model), str(tiny_model("qwen3_moe")), str(tmp_path))


def _saved(checkpoints, learner, step: int, **how) -> None:
    checkpoints.save(learner, step=step, extra={"step": step}, **how)
    checkpoints.wait()


def _faults(folder: str, out: str) -> None:
    layout, root = ParallelConfig(), Path(out)
    learner, ranks = _student(folder, layout, timeout_seconds=77.5)
    groups = torch.distributed.distributed_c10d._world.pg_map
    timeouts = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
    assert {t.total_seconds() for t in timeouts} == {77.5}, "Megatron's groups too"
    said: list[str] = []
    checkpoints = _checkpoints(root, ranks, layout, keep=3, say=said.append)
    assert checkpoints.load_newest(learner) is None
    for step in (1, 2, 3, 4):
        _some_steps(learner, ranks, step - 1, step)
        _saved(checkpoints, learner, step)
    assert checkpoints.steps() == [2, 3, 4], "the newest are kept"
    assert sorted(p.name for p in root.iterdir()) == [f"step_{s:06d}" for s in (2, 3, 4)]

    # A save cut short leaves a name with a dot, which nobody takes for a checkpoint.
    (root / ".step_000005.tmp").mkdir()
    assert checkpoints.steps() == [2, 3, 4]

    _writes_in_the_background(checkpoints, learner)
    _no_room(checkpoints, learner)
    _no_memory(checkpoints, learner)
    _checksums_are_those_of_sha256sum(root / "step_000005")
    _what_was_meant_is_digested(_checkpoints(root.with_name("other"), ranks, layout), learner)
    _what_cannot_be_read_is_no_damage(checkpoints, learner)
    said.clear()
    _damage_is_found(checkpoints, learner, said)


def _writes_in_the_background(checkpoints, learner) -> None:
    """On a slow file system saving only slows: the name appears when all is on disk."""
    go_on, fsync = threading.Event(), os.fsync

    def slow_fsync(file: int) -> None:
        if threading.current_thread().name == "checkpoint":
            go_on.wait()
        if stat.S_ISDIR(os.fstat(file).st_mode):  # as some network file systems
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    os.fsync = slow_fsync
    try:
        checkpoints.save(learner, step=5, extra={"step": 5}, files={"more.txt": b"kept"})
        for _ in range(3):
            checkpoints.poll()
            assert checkpoints.steps() == [2, 3, 4]
        go_on.set()
        checkpoints.wait()
    finally:
        os.fsync = fsync
    assert checkpoints.steps() == [3, 4, 5]


def _no_room(checkpoints, learner) -> None:
    # Every file over 64 KiB fails, as on a full disk.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, unlimited[1]))
    try:
        with pytest.raises(TrainingError, match=r"File too large.*step 5 is intact") as caught:
            _saved(checkpoints, learner, 6)
        assert caught.value.kind == "disk"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoints.steps() == [3, 4, 5]
    assert not list(checkpoints.folder.glob(".step_000006*"))
    assert checkpoints.load(learner, 5)["step"] == 5


def _no_memory(checkpoints, learner) -> None:
    """Nothing is begun that the kernel would end with the process."""
    from megatron_tropd.mcore import host_memory

    left, host_memory.available_bytes = host_memory.available_bytes, lambda: 1000
    try:
        told = r"the ranks on \S+ \(1\) need .* GiB are left there.*step 5"
        with pytest.raises(TrainingError, match=rf"step_000006 was not begun: {told}") as caught:
            checkpoints.save(learner, step=6, extra={})
        assert caught.value.kind == "training", "another attempt would fail alike"
        with pytest.raises(ConfigError, match=rf"could not save its last checkpoint: {told}"):
            checkpoints.check_memory(learner)
    finally:
        host_memory.available_bytes = left
    checkpoints.check_memory(learner)
    assert not list(checkpoints.folder.glob(".step_000006*"))


def _what_was_meant_is_digested(checkpoints, learner) -> None:
    """A disk that stores something else is found out when that is loaded."""
    fsync = os.fsync

    def flip_and_fsync(file: int) -> None:
        if threading.current_thread().name == "checkpoint":
            with open(f"/proc/self/fd/{file}", "r+b") as stored:
                stored.seek(1000)
                byte = stored.read(1)
                stored.seek(1000)
                stored.write(bytes([byte[0] ^ 1]))
        fsync(file)

    os.fsync = flip_and_fsync
    try:
        _saved(checkpoints, learner, 6)
    finally:
        os.fsync = fsync
    with pytest.raises(InputError, match="has other contents than were written"):
        checkpoints.load(learner, 6)


def _checksums_are_those_of_sha256sum(path: Path) -> None:
    files = json.loads((path / "checksums.json").read_text())["files"]
    assert (
        {".metadata", "metadata.json", "more.txt"}
        < files.keys()
        == {p.name for p in path.iterdir() if p.name != "checksums.json"}
    )
    printed = subprocess.check_output(["sha256sum", *files], cwd=path, text=True)
    assert {line.split()[1]: line.split()[0] for line in printed.splitlines()} == {
        name: entry["sha256"] for name, entry in files.items()
    }


def _what_cannot_be_read_is_no_damage(checkpoints, learner) -> None:
    """A hiccup passes; a file system that goes on failing ends the run, and costs no checkpoint."""
    file = next((checkpoints.folder / "step_000005").glob("*.distcp"))
    content = _unreadable(file)
    files.READ_PATIENCE = (0.0, 0.0)
    with pytest.raises(TrainingError, match=rf"{file.name}.*so nothing older is taken") as caught:
        checkpoints.load_newest(learner)
    assert caught.value.kind == "disk"
    files.READ_PATIENCE = (0.5,) * 20
    threading.Timer(0.2, lambda: (file.unlink(), file.write_bytes(content))).start()
    assert checkpoints.load_newest(learner)["step"] == 5
    # Without checksums the hiccup meets Megatron's own reading.
    checksums = (checkpoints.folder / "step_000005" / "checksums.json").read_bytes()
    (checkpoints.folder / "step_000005" / "checksums.json").unlink()
    before = [parameter.clone() for parameter in learner.module.parameters()]
    _unreadable(file)
    threading.Timer(5.0, lambda: (file.unlink(), file.write_bytes(content))).start()
    assert checkpoints.load_newest(learner)["step"] == 5
    assert all(map(torch.equal, before, learner.module.parameters()))
    (checkpoints.folder / "step_000005" / "checksums.json").write_bytes(checksums)
    assert checkpoints.steps() == [3, 4, 5], "nothing is set aside"


def _damage_is_found(checkpoints, learner, said: list[str]) -> None:
    """Flipped, cut, missing: each checkpoint names its file and gives way to the one before."""
    root = checkpoints.folder
    flipped, cut = (next((root / f"step_{s:06d}").glob("*.distcp")) for s in (5, 4))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{flipped.name} has other contents.*Remove that folder"):
        checkpoints.load(learner, 5)
    with pytest.raises(InputError, match=rf"{cut.name} has \d+ bytes, expected \d+"):
        checkpoints.load(learner, 4)
    assert checkpoints.load_newest(learner) == {"step": 3, "layout": [1, 1, 1, 1]}
    assert checkpoints.steps() == [3], "the damaged ones are set aside"
    assert (root / "step_000005.damaged").is_dir()
    assert "WARNING" in said[0] and flipped.name in said[0] and "from step 3" in said[0]

    # Older versions wrote no checksums: accepted, with a note; damage is found by reading.
    (root / "step_000003" / "checksums.json").unlink()
    said.clear()
    assert checkpoints.load_newest(learner)["step"] == 3
    assert len(said) == 1 and "not checked" in said[0]

    _saved(checkpoints, learner, 4)
    (root / "step_000004" / ".metadata").unlink()
    (root / "step_000003" / ".metadata").unlink()
    with pytest.raises(InputError, match=r"No checkpoint is intact.*\.metadata is missing"):
        checkpoints.load_newest(learner)
    assert checkpoints.steps() == [3, 4], "nothing is set aside for nothing"


def test_files_that_rank_0_does_not_see_yet_have_checksums(tmp_path):
    """A client of NFS may list a folder without what other nodes have just written there."""
    from megatron_tropd.mcore.checksums import Checksum, read_checksums, write_checksums

    (tmp_path / "mine").write_bytes(b"a")
    elsewhere = Checksum(3, "0" * 64)
    write_checksums(tmp_path, {"__1_0.distcp": elsewhere})
    found = read_checksums(tmp_path)
    assert found is not None and found.keys() == {"mine", "__1_0.distcp"}
    assert found["__1_0.distcp"] == elsewhere


def test_faults_leave_the_older_checkpoints_intact(tmp_path, tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True, num_key_value_heads=4)
    run_with_env(1, _faults, str(model), str(tmp_path / "checkpoints"))
