"""The CPU differences: in place without CUDA, absent with it; and what stands on them."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder

FINGERPRINT = """
import torch
import megatron.core.tensor_parallel.random as random

def fingerprint():
    places = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor,
              torch.nn.Module, random]
    return {(i, k): id(v) for i, p in enumerate(places) for k, v in vars(p).items()
            if not k.startswith("__")}

before = fingerprint()
"""


def run(script: str) -> None:
    """Run a script in a fresh interpreter; it must succeed."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_are_rounded_up_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd.mcore.layout import Layout

    layout = Layout(0, 1, 0, 1, 0, 1, 0, 1, groups=None)  # type: ignore[arg-type]
    assert layout.row_multiple == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert layout.row_multiple == 128


def test_a_gpu_run_never_touches_the_patches() -> None:
    run(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        + FINGERPRINT
        + """
import megatron_tropd.mcore.platform as platform
platform.prepare_platform()
platform.prepare_training()
assert not platform.is_prepared()
assert platform.distributed_backend() == "cpu:gloo,cuda:nccl"
changed = {k for k, v in fingerprint().items() if before.get(k) != v}
assert not changed, changed
"""
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU works")
def test_a_node_whose_gpus_do_not_work_is_not_trained_on() -> None:
    from megatron_tropd.mcore.platform import check_device

    with pytest.raises(TrainingError, match=r"8 GPUs .*torch finds none") as caught:
        check_device({"TROPD_GPUS_PER_NODE": "8"})
    assert caught.value.kind == "device"
    check_device({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU works")
def test_a_machine_with_a_broken_driver_does_not_train_on_its_cpu(tmp_path, monkeypatch) -> None:
    from megatron_tropd.mcore.platform import check_device

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: another'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(
        TrainingError, match=r'has 2 \(nvidia-smi.*finds none.*DEVICES=""'
    ) as caught:
        check_device({})
    assert caught.value.kind == "device"
    check_device({"CUDA_VISIBLE_DEVICES": ""})  # asked for
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    check_device({})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")
def test_without_cuda_the_patches_are_in_place_once() -> None:
    run(
        FINGERPRINT
        + """
import megatron_tropd.mcore.platform as platform
assert platform.is_prepared()
after = fingerprint()
assert after != before
platform.prepare_platform()
assert fingerprint() == after
assert platform.distributed_backend() == "gloo" and platform.device().type == "cpu"

x = torch.zeros(2, device="cuda").cuda()
assert x.device.type == "cpu" and x.type() == "torch.cuda.FloatTensor"
assert x.to("cuda:0").device.type == "cpu" and x.to(torch.float64).dtype == torch.float64
assert x.type(torch.int32).dtype == torch.int32
assert torch.ones(1, device=torch.cuda.current_device()).device.type == "cpu"
assert isinstance(torch.cuda.Stream, type)
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.Event().record()
with torch.device("meta"):  # transformers builds models so
    assert torch.empty(3).device.type == "meta"

torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)
"""
    )


def test_padded_vocabularies_agree_between_layouts() -> None:
    from megatron_tropd.mcore.models import padded_vocab_size

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    small, large = config | {"vocab_size": 105}, config | {"vocab_size": 259}
    assert padded_vocab_size(small, tensor=1) == 128
    assert {padded_vocab_size(small, large, tensor=t) for t in (1, 2, 4, 8)} == {320}
    assert padded_vocab_size(small, large, tensor=3) == 384


def test_layouts_that_do_not_divide_are_refused(tiny_model: Callable[..., Path]) -> None:
    from megatron_tropd.mcore.models import check_parallel

    config = HFFolder(tiny_model("llama", num_hidden_layers=3)).config
    check_parallel(config, ParallelConfig(tensor=2, pipeline=3), who="student")
    check_parallel(config, ParallelConfig(pipeline=2, uneven_stages=True), who="student")
    for layout, named in (
        (ParallelConfig(tensor=4), "teacher's key/value heads, found 2"),
        (ParallelConfig(tensor=3), "teacher's attention heads, found 4"),
        (ParallelConfig(pipeline=2), "teacher's layers, found 3"),
        (ParallelConfig(pipeline=4, uneven_stages=True), "teacher's layers, found 3"),
    ):
        with pytest.raises(ConfigError, match=named):
            check_parallel(config, layout, who="teacher")


def test_the_number_of_processes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tropd.mcore import parallel

    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="needs as many processes, found 1"):
        parallel.initialize(ParallelConfig(tensor=2), seed=1)


def test_places_and_ranks_are_inverse() -> None:
    from megatron_tropd.convert.sizes import stage_chunks, stage_sizes
    from megatron_tropd.mcore.layout import Layout

    ranks = Layout(0, 12, 0, 2, 0, 3, 0, 2, groups=None)  # type: ignore[arg-type]
    for one in (ranks, dataclasses.replace(ranks, world_size=24, cp_rank=1, cp_size=2)):
        assert one.replica == one.cp_rank
        for rank in range(one.world_size):
            tp_rank, pp_rank, replica = one.place(rank)
            assert one.global_rank(tp_rank=tp_rank, pp_rank=pp_rank, replica=replica) == rank
            assert replica < one.world_size // 6
    assert [ranks.ep_rank_of(rank) for rank in range(4)] == [0, 0, 0, 0]
    whole = dataclasses.replace(ranks, ep_size=4)
    assert [whole.ep_rank_of(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert whole.neighbour(6, 1) == 5
    sharded = dataclasses.replace(ranks, ep_size=2, etp_size=2)
    assert [sharded.ep_rank_of(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert sharded.neighbour(7, 0) == 5 and sharded.neighbour(5, 1) == 7
    assert stage_sizes(5, 2) == [3, 2]
    assert stage_sizes(4, 2) == [2, 2]
    assert stage_chunks(9, 2, 2) == [[range(0, 3), range(5, 7)], [range(3, 5), range(7, 9)]]
    assert stage_sizes(9, 2, 2) == [5, 4]
    assert ranks.chunks(6) == [range(0, 2)]
    chunked = dataclasses.replace(ranks, pp_rank=1, vp_size=2)
    assert chunked.chunks(7) == [range(2, 3), range(5, 6)]
    assert (ranks.batch_multiple, chunked.batch_multiple) == (1, 3)


@pytest.mark.parametrize("damage", ["missing", "surplus", "shape"])
def test_every_tensor_is_accounted_for(
    damage: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from megatron_tropd.mcore.weights import check_tensors

    source = tiny_model("llama")
    tensors = load_file(str(source / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "surplus":
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(InputError, match=name):
        check_tensors(HFFolder(tmp_path))
    check_tensors(HFFolder(source))
