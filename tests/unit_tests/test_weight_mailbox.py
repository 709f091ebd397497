"""The mailbox between trainer and engine, without an engine."""

import collections
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.rollout.engines.engine import (
    check_complete,
    engine_environment,
    tensor_shapes,
)
from megatron_tropd.rollout.engines.engine_model import engine_tensors
from megatron_tropd.rollout.weights import versions
from megatron_tropd.rollout.weights.mailbox import WeightMailbox, remove_stale
from megatron_tropd.rollout.weights.versions import VersionChannel, WeightsName, WeightVersions

Tensors = Iterable[tuple[str, torch.Tensor | None]]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the folder's files."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_weights_are_written_in_buckets_one_version_at_a_time(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(7)}
    tensors["lm_head.weight"] = tensors["layer.0"]
    tensors["part"] = torch.arange(200.0).reshape(20, 10)[::2]
    with WeightMailbox(tmp_path, bucket_bytes=1000) as mailbox:
        for version in (1, 2):
            stream = iter([("absent", None), *((k, v + version) for k, v in tensors.items())])
            folder = mailbox.write(stream)
            assert len(list(folder.glob("*.safetensors"))) == 5
            found = read(folder)
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[name], tensor + version)
            assert [p.name for p in mailbox.folder.iterdir() if p.is_dir()] == [str(version)]
        mailbox.clear()
        assert not list(mailbox.folder.glob("*/"))
    assert not mailbox.folder.exists()


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    with WeightMailbox(tmp_path) as mailbox:
        found = read(mailbox.write(iter([("a", shared), ("b", shared), ("c", shared[:2])])))
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared[:2])


def test_living_mailboxes_are_kept_and_left_overs_removed(tmp_path: Path) -> None:
    living = WeightMailbox(tmp_path)
    dead = WeightMailbox(tmp_path)
    dead._lock.close()
    (tmp_path / "other").mkdir()
    remove_stale(tmp_path)
    assert living.folder.exists()
    assert not dead.folder.exists()
    assert (tmp_path / "other").exists()
    living.close()


def test_a_full_disk_is_an_error_that_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**21, 2**20, 2**20))
    with (
        WeightMailbox(tmp_path) as mailbox,
        pytest.raises(TrainingError, match="has 1 MiB free, the student's weights need 4 MiB"),
    ):
        mailbox.write(iter([("a", torch.zeros(2**20))]))


def test_tied_models_must_bring_an_explicit_output_layer(
    tiny_qwen3: Path, tiny_llama: Path
) -> None:
    tied = engine_tensors(HFFolder(tiny_qwen3).config)
    assert "lm_head.weight" not in tensor_shapes(tiny_qwen3)
    assert tied["lm_head.weight"] == tied["model.embed_tokens.weight"] == (259, 64)
    with pytest.raises(InputError, match=r"missing 1 \(lm_head.weight\)"):
        check_complete(tied, tensor_shapes(tiny_qwen3), tiny_qwen3)
    check_complete(
        engine_tensors(HFFolder(tiny_llama).config), tensor_shapes(tiny_llama), tiny_llama
    )


def test_the_engine_inherits_neither_its_parents_place_in_the_job_nor_its_cuda_settings() -> None:
    base = {
        "PATH": "/bin",
        "RANK": "3",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "x",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    cpu = engine_environment(base, threads=2, cuda_devices=None)
    assert cpu["PATH"] == "/bin"
    assert cpu["OMP_NUM_THREADS"] == "2"
    assert not cpu.keys() & {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    assert (cpu["TORCHDYNAMO_DISABLE"], cpu["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
    gpu = engine_environment(base, threads=2, cuda_devices="5")
    assert gpu["CUDA_VISIBLE_DEVICES"] == "5"
    assert "TORCHDYNAMO_DISABLE" not in gpu
    assert not [name for name in gpu if "ALLOC_CONF" in name or "CONNECTIONS" in name]
    assert gpu["NCCL_SOCKET_IFNAME"] == "ib0"


def test_versions_are_complete_named_by_their_writer_and_pruned(tmp_path: Path) -> None:
    versions = WeightVersions(tmp_path / "weights")
    for number in (1, 2, 3):
        name = WeightsName(number, "me")
        versions.write(name, iter([("a", torch.full((2,), float(number))), ("absent", None)]))
        assert torch.equal(read(versions.find(name))["a"], torch.full((2,), float(number)))
    (tmp_path / "weights" / ".version_000004.dead").mkdir()
    versions.prune(2, 3)
    assert sorted(p.name for p in versions.folder.iterdir()) == ["version_000002", "version_000003"]
    versions.write(WeightsName(3, "resumed"), iter([("a", torch.zeros(2))]))
    with pytest.raises(TrainingError, match="of the trainer resumed, expected me"):
        versions.find(WeightsName(3, "me"))
    versions.clear()
    assert not versions.folder.exists()


def test_a_version_that_cannot_be_written_leaves_the_older_and_exhausts_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = WeightVersions(tmp_path)
    versions.write(WeightsName(1, "me"), iter([("a", torch.zeros(2))]))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**21, 2**20, 2**20))
    tensors = iter([("a", torch.zeros(2**27)), ("b", torch.zeros(2)), ("c", torch.zeros(2))])
    with pytest.raises(TrainingError, match=r"after step 2 could not be handed.*has 1 MiB free"):
        versions.write(WeightsName(2, "me"), tensors)
    assert next(tensors, None) is None, "making them is collective"
    assert [p.name for p in tmp_path.iterdir()] == ["version_000001"]


def test_the_folder_has_room_for_what_is_needed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest version, and one step ahead that of the samples that are pending."""
    most: list[int] = []

    class Counted(WeightVersions):
        def write(self, name: WeightsName, tensors: Tensors) -> None:
            super().write(name, tensors)
            most.append(len(list(self.folder.iterdir())))

    monkeypatch.setattr(versions, "run_everywhere", lambda action: [action()])
    channel = VersionChannel(Counted(tmp_path / "weights"), is_writer=True)
    for number in (1, 2, 3):
        channel.send(iter([("a", torch.zeros(2))]), number)
    for number in (4, 5, 6):
        channel.needed = channel.name
        channel.send(iter([("a", torch.zeros(2))]), number)
    assert most == [1, 1, 1, 2, 2, 2]
