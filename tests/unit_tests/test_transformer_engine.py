"""Real Transformer Engine layers, without a GPU: their names, shapes and extra states are ours.

Its torch extension imports without a driver, and its modules can be built on a CPU once they are
told that there is CUDA; only computing takes a GPU. Skipped where it does not import: it is no part
of the CPU environment, for Megatron-Core would take its paths.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
MIXTURES = ("qwen3_moe", "mixtral")

PROLOGUE = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_tropd.mcore import platform, models, parallel
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.checkpoint_layout import checkpoint_layout
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

def for_transformer_engine(truth):
    def answer():
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return asker.startswith("transformer_engine") or truth()
    return answer

torch.cuda.is_available = for_transformer_engine(torch.cuda.is_available)
"""

MARKS = """
names = "sequence_parallel", "tensor_model_parallel", "partition_dim", "allreduce"
places = ParallelConfig(tensor=2, sequence_parallel=True)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
ranks = parallel.initialize(places, seed=1)

def marks(path, with_te):
    models.has_transformer_engine = lambda: with_te
    folder = HFFolder(path)
    width = models.padded_vocab_size(folder.config, tensor=2)
    model = models.build_model(
        folder, layout=ranks, parallel=places, dtype=torch.float32, padded_vocab_size=width
    )
    found = {}
    for name, parameter in model.trainable().items():
        # Where it is not said, gradients are summed over the data-parallel ranks.
        default = {"allreduce": True}
        found[name] = {x: getattr(parameter, x, default.get(x)) for x in names}
        found[name]["shape"] = list(parameter.shape)
    return found

print(json.dumps([marks(Path(sys.argv[1]), with_te) for with_te in (True, False)]))
"""

PROGRAM = """
models.has_transformer_engine = lambda: True

def leaves(tree):
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree

def look(path, ranks, out):
    folder = HFFolder(path)
    width = models.padded_vocab_size(folder.config, tensor=1)
    settings = dict(
        layout=ranks, parallel=ParallelConfig(), dtype=torch.float32, padded_vocab_size=width
    )
    model = models.build_model(folder, **settings)
    hf_to_megatron(ToMegatron(path, out))
    again = models.build_model(MegatronFolder(out / "release"), **settings)
    loaded = dict(again.trainable())
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, loaded.pop(name)), name
    assert not loaded
    exported = dict(model.exported())
    assert exported.keys() == folder.names, exported.keys() ^ folder.names
    for name, tensor in exported.items():
        assert torch.equal(tensor, folder.read(name)), name
    expected = checkpoint_layout(folder.config, width)
    state = model.module.sharded_state_dict()
    apply_factories(state)  # gate and up projection are stored as one, and made of two
    state = list(leaves(state))
    tensors = {x.key: list(x.global_shape) for x in state if isinstance(x, ShardedTensor)}
    objects = sorted(x.unique_key for x in state if isinstance(x, ShardedObject))
    te = {type(m).__name__ for m in model.module.modules() if type(m).__name__.startswith("TE")}
    return {
        "tensors": tensors,
        "expected tensors": {k: list(v) for k, v in expected.shapes().items()},
        "objects": objects,
        "expected objects": sorted(expected.objects),
        "layers": sorted(te),
    }

ranks = parallel.initialize(ParallelConfig(), seed=1)
found = {}
for name, path in json.loads(sys.argv[1]).items():
    try:
        found[name] = look(Path(path), ranks, Path(sys.argv[2], name))
    except Exception as error:
        import traceback
        found[name] = {"error": traceback.format_exc()[-3000:]}
print(json.dumps(found))
"""


def _why_not() -> str | None:
    """Why Transformer Engine cannot be imported; None: it can. In a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", "import torch, transformer_engine.pytorch"],
        capture_output=True,
        text=True,
    )
    return run.stderr.strip().splitlines()[-1] if run.returncode else None


def _run(program: str, *arguments: str):
    run = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory):
    """What was found of a model of every family."""
    if reason := _why_not():
        pytest.skip(f"Transformer Engine does not import: {reason}")
    folders = {name: str(tiny_model(name)) for name in FAMILIES}
    return _run(PROGRAM, json.dumps(folders), str(tmp_path_factory.mktemp("te")))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_in_and_come_out(family, found):
    """From an HF folder, and from Megatron's checkpoint, bit for bit; and out under HF names."""
    assert "error" not in found[family], found[family]["error"]
    layers = set(found[family]["layers"])
    assert {
        "TELayerNormColumnParallelLinear",
        "TERowParallelLinear",
        "TEDotProductAttention",
    } <= layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_checkpoint_has_the_names_that_the_layers_ask_for(family, found):
    one = found[family]
    assert "error" not in one, one["error"]
    assert one["tensors"] == one["expected tensors"]
    assert set(one["objects"]) <= set(one["expected objects"])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_parameters_carry_the_marks_of_megatrons_own_layers(family, found, tiny_model):
    """By them gradients are summed over ranks: of norms under sequence parallelism, of experts.

    ``partition_stride`` differs for grouped experts; nothing here reads it.
    """
    te, local = _run(MARKS, str(tiny_model(family)))
    renamed = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
    renamed["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"
    for name, marks in te.items():
        layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
        own = f"decoder.layers.{layer}.{renamed[rest]}" if rest in renamed else name
        expert = re.fullmatch(r"(.*\.experts)\.(linear_fc\d)\.weight(\d+)", own)
        if expert:
            own = f"{expert[1]}.local_experts.{expert[3]}.{expert[2]}.weight"
        assert marks == local.pop(own), name
        assert marks["allreduce"] == (".mlp.experts." not in name)
        assert bool(marks["sequence_parallel"]) == ("norm" in name or "router" in name), name
    assert not local
