"""Megatron models compute what transformers computes, and export what was loaded."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from machine import data_folder, why_not
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.families import model_shape, plan
from megatron_tropd.convert.hf_folder import HFFolder
from tests.ranks import leave_layout, run_with_env

TOLERANCE = 1e-4
PROMPT = 48
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2, uneven_stages=True),
    "pp2": ParallelConfig(pipeline=2, uneven_stages=True),
    "tp2-pp2-sp": ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, uneven_stages=True),
    "cp2": ParallelConfig(context=2, uneven_stages=True),
    "tp2-cp2-sp": ParallelConfig(tensor=2, context=2, sequence_parallel=True, uneven_stages=True),
    "pp2-cp2": ParallelConfig(pipeline=2, context=2, uneven_stages=True),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2, uneven_stages=True),
    "pp2-vpp2-ep2": ParallelConfig(pipeline=2, virtual_pipeline=2, data=2, expert=2),
    "cp2-ep2": ParallelConfig(context=2, expert=2),
    "ep2": ParallelConfig(data=2, expert=2),
    "tp2-ep2": ParallelConfig(tensor=2, data=2, expert=2),
    "pp2-ep2": ParallelConfig(pipeline=2, data=2, expert=2, uneven_stages=True),
    "dp4-ep2": ParallelConfig(data=4, expert=2),
    "tp2-whole": ParallelConfig(tensor=2, expert_tensor=1),
    "tp2-whole-ep2": ParallelConfig(tensor=2, expert=2, expert_tensor=1),
    "tp2-dp2-whole-ep2": ParallelConfig(tensor=2, data=2, expert=2, expert_tensor=1),
    "tp2-pp2-whole-ep2": ParallelConfig(
        tensor=2, pipeline=2, expert=2, expert_tensor=1, uneven_stages=True
    ),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW_FROM_LAYER_1 = {"use_sliding_window": True, "max_window_layers": 1}
DENSE = (
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("qwen2", {"head_dim": 16}),
    ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
    ("qwen2", {"head_dim": 16, "sliding_window": 7} | WINDOW_FROM_LAYER_1),
    ("qwen3", {"tie_word_embeddings": True}),
    ("mistral", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": None}),
)
MIXTURES = (
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 9, "num_hidden_layers": 3}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "tie_word_embeddings": True}),
)
DEEP = (
    ("qwen2", {"head_dim": 16, "sliding_window": 7, "num_hidden_layers": 5} | WINDOW_FROM_LAYER_1),
    ("qwen3", {"tie_word_embeddings": True, "num_hidden_layers": 6}),
    ("qwen3_moe", {"num_hidden_layers": 4}),
)
"""For virtual stages; the last one for shared experts, too."""
WRONG = (
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 11}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("llama", "model.layers.1.self_attn.k_proj.weight"),
    ("qwen2", "model.layers.0.self_attn.v_proj.bias"),
    ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
)
"""A setting, or a tensor of which one row is wrong."""
Case = tuple[Path, torch.Tensor, torch.Tensor]
REAL = ("stories260K", "babyllama-tok105", "stories260K-hd32", "babyllama-tok105-hd32")
FOR_REAL_MODELS = ("tp1", "tp2", "pp2", "tp2-pp2-sp")
FOR_WRONG_MODELS = ("tp1", "tp2-pp2-sp")
WORLD_SIZES = (1, 2, 4)


@dataclass(frozen=True)
class Checks:
    """What a layout has to show. Of every case: folder, ids and logits of transformers."""

    layout: str
    same: list[Case]
    different: list[Case]
    """Another setting or one wrong weight is told apart, so equality means something."""


@pytest.fixture(scope="module")
def check(tiny_model: Callable[..., Path], tmp_path_factory) -> Callable[[int], None]:
    """``check(world_size)``: everything on so many ranks, in one spawn, once."""
    checked: set[int] = set()

    def once(world_size: int) -> None:
        if world_size not in checked:
            scratch = tmp_path_factory.mktemp("logits")
            layouts = [n for n, layout in LAYOUTS.items() if layout.world_size == world_size]
            everything = [_checks(name, tiny_model, scratch) for name in layouts]
            run_with_env(world_size, _on_rank, everything, scratch)
            checked.add(world_size)

    return once


def _checks(name: str, tiny_model: Callable[..., Path], scratch: Path) -> Checks:
    layout = LAYOUTS[name]
    of_mixtures = layout.expert > 1 or layout.expert_tensor is not None
    tiny = MIXTURES if of_mixtures else DENSE + MIXTURES
    if layout.virtual_pipeline > 1:
        tiny = DEEP[2:] if of_mixtures else DEEP
    same = [tiny_model(family, **overrides) for family, overrides in tiny]
    cases = [(folder, *_reference(folder)) for folder in same]
    if name in FOR_REAL_MODELS and why_not("data") is None:
        real = [data_folder() / "models" / folder for folder in REAL]
        cases += [(folder, *_reference(folder, greedy=64)) for folder in real]
    return Checks(name, cases, _wrong(tiny_model, scratch) if name in FOR_WRONG_MODELS else [])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tiny_logits_and_export(world_size: int, check: Callable[[int], None]) -> None:
    """Also that a wrong model is told apart."""
    check(world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_real_logits_greedy_continuations_and_export(
    world_size: int, shared_data: Path, check: Callable[[int], None]
) -> None:
    check(world_size)


def _wrong(tiny_model: Callable[..., Path], scratch: Path) -> list[Case]:
    """Models that differ from that whose logits stand beside them."""
    cases = []
    for number, (family, change) in enumerate(WRONG):
        original, wrong = tiny_model(family), scratch / f"wrong-{number}"
        shutil.copytree(original, wrong, dirs_exist_ok=True)
        if isinstance(change, dict):
            config = json.loads((wrong / "config.json").read_text())
            (wrong / "config.json").write_text(json.dumps(config | change))
        else:
            _halve_a_row(wrong / "model.safetensors", change)
        cases.append((wrong, *_reference(original)))
    return cases


def _halve_a_row(path: Path, name: str) -> None:
    weights = load_file(path)
    weights[name][1] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})


@functools.cache
def _reference(folder: Path, greedy: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, followed by ``greedy`` ids of transformers' own choice, and their logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, PROMPT), generator=generator)
    with torch.no_grad():
        if greedy:
            model.generation_config.eos_token_id = None
            ids = model.generate(ids, do_sample=False, max_new_tokens=greedy)
        return ids, model(ids).logits


def _on_rank(everything: list[Checks], scratch: Path) -> None:
    from megatron_tropd.mcore import platform

    dist.init_process_group(platform.distributed_backend())
    for checks in everything:
        try:
            _on_rank_of(checks, scratch / checks.layout)
        except AssertionError as error:
            raise AssertionError(f"{checks.layout}: {error}") from error
        leave_layout()


def _on_rank_of(checks: Checks, scratch: Path) -> None:
    from megatron_tropd.mcore import parallel as mcore_parallel

    parallel = LAYOUTS[checks.layout]
    ranks = mcore_parallel.initialize(parallel, seed=1)
    for path, ids, expected in checks.different:
        _, logits, _ = _build(parallel, HFFolder(path), ids, ranks)
        if logits is not None:
            difference = _difference(logits, expected)
            assert difference > 10 * TOLERANCE, (str(path), difference)
    for index, (path, ids, expected) in enumerate(checks.same):
        folder = _Recording(path)
        if ranks.dp_size > 1:  # replicas that share experts have tokens of their own
            ids, expected = (whole[[ranks.dp_rank % 2]] for whole in (ids, expected))
        model, logits, rows = _build(parallel, folder, ids, ranks)
        _check_experts_read(folder, ranks)
        if ranks.world_size == 1:
            _check_names(model.module, folder)
        if logits is not None:
            difference = _difference(logits, expected)
            assert difference < TOLERANCE, (str(path), difference)
            # What transformers appended is what this model would have, token by token.
            chosen = logits[:, PROMPT - 1 : -1, : expected.shape[-1]].argmax(-1)
            assert torch.equal(chosen, ids[:, PROMPT:]), path
        _check_export(model, folder, ranks, rows, scratch / str(index))


def _build(parallel: ParallelConfig, folder: HFFolder, ids: torch.Tensor, ranks: Any) -> Any:
    """(model, its logits on the last stage, its padded rows)."""
    from megatron_tropd.mcore import models

    layout = parallel
    if model_shape(folder.config).experts and parallel.tensor > 1:
        layout = dataclasses.replace(parallel, sequence_parallel=True)
    rows = models.padded_vocab_size(folder.config, tensor=parallel.tensor)
    model = models.build_model(
        folder, layout=ranks, parallel=layout, dtype=torch.float32, padded_vocab_size=rows
    )
    return model, _gathered_logits([chunk.eval() for chunk in model.chunks], ids, ranks), rows


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


class _Recording(HFFolder):
    """Knows which tensors were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names_read: set[str] = set()

    def read(self, name: str, **part: int) -> torch.Tensor:
        self.names_read.add(name)
        return super().read(name, **part)


def _check_experts_read(folder: _Recording, ranks) -> None:
    """A rank reads the experts that it holds and no other."""
    experts = model_shape(folder.config).experts
    if experts is not None:
        size = experts.count // ranks.ep_size
        found = {int(n) for name in folder.names_read for n in re.findall(r"experts\.(\d+)", name)}
        assert found == set(range(ranks.ep_rank * size, (ranks.ep_rank + 1) * size))


def _check_names(model, folder: HFFolder) -> None:
    """The names of the plan are those under which Megatron saves the model."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    saved = model.sharded_state_dict().values()
    expected = {part.key for part in saved if not isinstance(part, ShardedObject)}
    names = {re.sub(r"layers\.\d+", "layers", entry.name) for entry in plan(folder.config)}
    assert names == expected


def _gathered_logits(chunks, ids, ranks) -> torch.Tensor | None:
    """[B, S, padded V] on the last stage, through the pipeline schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_tropd.mcore.layout import zigzag

    places = [zigzag(ids.shape[1], rank, ranks.cp_size) for rank in range(ranks.cp_size)]
    here = torch.arange(ids.shape[1]) if ranks.cp_size == 1 else places[ranks.cp_rank]
    ids, positions = ids[:, here], here.expand(len(ids), -1)

    def forward(iterator, chunk):
        output = chunk(input_ids=ids, position_ids=positions, attention_mask=None)
        return output, lambda logits, non_loss_data=True: logits

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([0])] * len(chunks),
            model=chunks,
            # Virtual stages take as many as there are stages.
            num_microbatches=ranks.batch_multiple,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not ranks.is_last_stage:
        return None
    shards = [torch.empty_like(found[0]) for _ in range(ranks.tp_size)]
    dist.all_gather(shards, found[0].contiguous(), group=ranks.tp_group)
    logits = torch.cat(shards, dim=-1)
    if ranks.cp_size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in places]
    dist.all_gather(parts, logits, group=ranks.row_group)
    return torch.cat(parts, dim=1)[:, torch.cat(places).argsort()]


def _check_export(model, folder: HFFolder, ranks, rows: int, out: Path) -> None:
    """Streamed to the first and the last rank, and written as a folder: bit for bit the input."""
    from megatron_tropd.mcore.export import save_hf
    from megatron_tropd.mcore.weights import export_weights

    receivers = {0, ranks.world_size - 1}
    for bucket_bytes in (1, 2**28):
        stream = export_weights(
            model.trainable(),
            folder.config,
            ranks,
            padded_vocab_size=rows,
            receivers=sorted(receivers),
            explicit_lm_head=True,
            bucket_bytes=bucket_bytes,
        )
        received = dict(stream)
        assert set(received) == folder.names | {"lm_head.weight"}
        if ranks.rank in receivers:
            for name in folder.names:
                assert torch.equal(received[name], folder.read(name)), name
            if "lm_head.weight" not in folder.names:
                embedding = folder.read("model.embed_tokens.weight")
                assert torch.equal(received["lm_head.weight"], embedding)
        else:
            assert all(tensor is None for tensor in received.values())
    save_hf(model, folder, out, max_file_bytes=100_000)
    if ranks.is_main:
        written = HFFolder(out)
        assert len(list(out.glob("*.safetensors"))) > 1
        assert written.names == folder.names
        assert all(torch.equal(written.read(n), folder.read(n)) for n in folder.names)
        assert (out / "tokenizer_config.json").exists()
        AutoModelForCausalLM.from_pretrained(out)
        assert not list(out.parent.glob(".*partial*"))
    # A write that fails is an error on every rank, and nobody is left waiting.
    with pytest.raises(TrainingError, match="could not be written"):
        save_hf(model, folder, folder.path / "config.json" / "out")
