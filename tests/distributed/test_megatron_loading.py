"""Converted checkpoints in Megatron's own hands: its ``--load``, its layers, its checkpoints back.

``megatron.training`` reads the arguments and the weights itself; the model is built from these
arguments with Megatron's local layers. One spawn per layout checks every family.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.ranks import leave_layout, run_with_env, save_without_manager

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
}
MODELS = (
    ("llama", {}),
    ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
    ("qwen3", {"tie_word_embeddings": True}),
)
OPTIONS = """
--micro-batch-size 1 --train-iters 1 --seq-length 256
--ckpt-format torch_dist --exit-on-missing-checkpoint
--transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion
--no-persist-layer-norm --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
--no-masked-softmax-fusion
"""
"""What a command line needs besides the checkpoint where there is no GPU."""
IDS = [5, 17, 200, 31, 8, 99, 101, 3]


def _megatron_arguments(folder: Path, layout: ParallelConfig):
    """What Megatron's training loop knows after ``--load folder --use-checkpoint-args``."""
    from megatron.training import arguments, checkpointing, global_vars

    sys.argv = ["pretrain", "--load", str(folder), "--use-checkpoint-args"]
    sys.argv += f"--tensor-model-parallel-size {layout.tensor}".split()
    sys.argv += f"--pipeline-model-parallel-size {layout.pipeline}".split()
    sys.argv += OPTIONS.split()
    args = arguments.parse_args()
    checkpointing.load_args_from_checkpoint(args)
    # What load_args_from_checkpoint leaves to the command line.
    saved = checkpointing._load_base_checkpoint(args.load, args, rank0=True)[0]["args"]
    args.qk_layernorm = saved.qk_layernorm
    args.layernorm_epsilon = saved.layernorm_epsilon
    arguments.get_device_arch_version = lambda: 10  # it asks the GPU, which is not there
    arguments.validate_args(args)
    global_vars.set_args(args)
    return args


def _megatron_model(args):
    """Megatron's GPTModel with its own local layers, from its own arguments."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    config.perform_initialization = False
    spec = get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    ).eval()


def _load_with_megatron(folder: Path, layout: ParallelConfig, logits: Path) -> None:
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )
    from megatron.training import checkpointing, global_vars

    from megatron_tropd.mcore import parallel

    parallel.initialize(layout, seed=1)
    args = _megatron_arguments(folder, layout)
    init_num_microbatches_calculator(dist.get_rank(), None, 1, 1, 1)
    model = _megatron_model(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert checkpointing.load_checkpoint([model], None, None)[0] == 0
    assert all(p.isfinite().all() for p in model.parameters()), "every parameter was loaded"
    if layout == ParallelConfig():
        ids = torch.tensor([IDS])
        mask = torch.ones(1, 1, len(IDS), len(IDS), dtype=torch.bool).triu(1)
        with torch.no_grad():
            torch.save(model(ids, torch.arange(len(IDS))[None], mask), logits)
    _save_again(model, folder.with_name(f"{folder.name}-{layout.tensor}"))
    global_vars.unset_global_variables()
    destroy_num_microbatches_calculator()
    leave_layout()


def _save_again(model, out: Path) -> None:
    """What Megatron's loop writes of a model, with things beside it that are no model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    path = out / "iter_0000007"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {
        "model": model.sharded_state_dict(metadata={"singleton_local_shards": False}),
        "rng_state": ShardedObject("rng_state", b"x", (world,), (rank,), replica_id=0),
        "iteration": 7,
    }
    dist_checkpointing.save(state, str(path), async_strategy="mcore")


def _load_all(folders: list[str], layout: ParallelConfig) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    save_without_manager()
    for folder in map(Path, folders):
        _load_with_megatron(folder, layout, folder.with_suffix(".logits"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_model: Callable[..., Path]) -> dict[Path, Path]:
    """HF folder -> Megatron folder."""
    out = tmp_path_factory.mktemp("converted")
    folders = {}
    for family, overrides in MODELS:
        source = tiny_model(family, **overrides)
        folders[source] = out / family
        hf_to_megatron(ToMegatron(source, folders[source], tensor_parallel=2))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_megatron_loads_what_was_converted(name: str, converted: dict[Path, Path], tmp_path: Path):
    layout = LAYOUTS[name]
    run_with_env(layout.world_size, _load_all, [str(f) for f in converted.values()], layout)
    for source, folder in converted.items():
        if layout == ParallelConfig():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            expected = model(torch.tensor([IDS])).logits
            found = torch.load(folder.with_suffix(".logits"))[..., : expected.shape[-1]]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        saved = folder.with_name(f"{folder.name}-{layout.tensor}")
        megatron_to_hf(ToHF(saved, tmp_path / folder.name, hf_config=source))
        one = load_file(source / "model.safetensors")
        other = load_file(tmp_path / folder.name / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        original = json.loads((source / "config.json").read_text())
        assert json.loads((tmp_path / folder.name / "config.json").read_text()) == original
