"""Our models from converted checkpoints, under any layout; our checkpoints back to HF.

One spawn of four ranks: every family is converted once and read under layouts of TP, PP and EP.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_checkpoint import _checkpoints, _saved
from test_training import TRAIN

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.ranks import leave_layout, run_with_env

DENSE = {
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
}
MIXTURE = {
    "tp2-ep2": ParallelConfig(tensor=2, data=2, expert=2, sequence_parallel=True),
    "pp2-ep2": ParallelConfig(pipeline=2, data=2, expert=2),
}
MODELS = {
    "llama": ({"num_hidden_layers": 4, "num_key_value_heads": 4}, DENSE),
    "qwen2": ({"tie_word_embeddings": True, "num_hidden_layers": 4}, DENSE),
    "qwen3": ({"num_hidden_layers": 4}, DENSE),
    "mistral": ({"num_hidden_layers": 4}, DENSE),
    "qwen3_moe": ({"num_hidden_layers": 2}, MIXTURE),
    "mixtral": ({"num_hidden_layers": 2}, MIXTURE),
}


def _wanted_keys(model) -> set[str]:
    """Everything Megatron would ask a checkpoint for, under the stored names."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    apply_factories(state)
    return {
        part.unique_key if isinstance(part, ShardedObject) else part.key
        for part in nested_values(state)
    }


def _check(source: Path, converted: Path, layout: ParallelConfig, out: Path) -> None:
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.student import Student

    ranks, megatron = parallel.initialize(layout, seed=1), MegatronFolder(converted)
    expected, found = (
        models.build_model(  # the checkpoint has 512 rows
            folder, layout=ranks, parallel=layout, dtype=torch.float32, padded_vocab_size=320
        )
        for folder in (HFFolder(source), megatron)
    )
    assert _wanted_keys(expected.module) <= megatron.reader.names | megatron.reader.objects
    for (name, one), (other_name, other) in zip(
        expected.trainable().items(), found.trainable().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name
    learner = Student(found, train=TRAIN, parallel=layout, dtype=torch.float32)
    _saved(_checkpoints(out / "checkpoints", ranks, layout), learner, 3)
    leave_layout()


def _check_upstream_layers(source: Path, converted: Path) -> None:
    """Megatron's own local layers, which name a mixture's norm otherwise, find all they want."""
    from argparse import Namespace

    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_tropd.convert.families import model_shape
    from megatron_tropd.mcore import models, parallel

    layout = ParallelConfig(data=4)
    parallel.initialize(layout, seed=1)
    shape = model_shape(HFFolder(source).config)
    config = models.transformer_config(shape, layout, torch.float32)
    spec = get_gpt_layer_local_spec(
        num_experts=shape.experts.count if shape.experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
    )
    model = GPTModel(
        config, spec, vocab_size=512, max_sequence_length=256, position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
    )  # fmt: skip
    stored = MegatronFolder(converted).reader
    assert _wanted_keys(model) <= stored.names | stored.objects
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    wanted = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
    with torch.serialization.safe_globals([Namespace]):
        loaded = dist_checkpointing.load(
            wanted, str(converted / "release"), strict="raise_unexpected"
        )
    model.load_state_dict(loaded["model"])
    norm = HFFolder(source).read("model.layers.1.post_attention_layernorm.weight")
    assert torch.equal(model.decoder.layers[1].pre_mlp_layernorm.weight, norm)
    assert all(p.isfinite().all() for p in model.parameters())
    leave_layout()


def _check_all(folders: dict[str, tuple[str, str]], out: str) -> None:
    dist.init_process_group("gloo")
    for family, (source, converted) in folders.items():
        for name, layout in MODELS[family][1].items():
            _check(Path(source), Path(converted), layout, Path(out) / f"{family}-{name}")
        _check_upstream_layers(Path(source), Path(converted))


def _same(one: Path, other: Path) -> None:
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_every_layout_reads_and_writes_them(tiny_model: Callable[..., Path], tmp_path: Path):
    folders = {}
    for family, (overrides, _) in MODELS.items():
        source = tiny_model(family, **overrides)
        hf_to_megatron(ToMegatron(source, tmp_path / family, tensor_parallel=2))
        folders[family] = (str(source), str(tmp_path / family))
    run_with_env(4, _check_all, folders, str(tmp_path / "runs"))
    for family, (source, _) in folders.items():
        for name in MODELS[family][1]:
            run = tmp_path / "runs" / f"{family}-{name}"
            (run / "config.json").write_text(json.dumps({"model": {"student": source}}))
            megatron_to_hf(ToHF(run / "checkpoints" / "step_000003", run / "hf"))
            _same(Path(source), run / "hf")
