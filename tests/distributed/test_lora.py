"""Adapters are the same function, gradients and training under every layout, and the base is still.

The adapters here are drawn by name, B included, so that every layout has the same ones and no
gradient is zero. Gradients are put together as an export puts weights together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import _checkpoints, _saved
from test_training import TRAIN, recorded_trajectories

from megatron_tropd.config import LoraConfig, MegatronConfig, ParallelConfig
from megatron_tropd.convert.adapters import FirstAdapters
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.packing import pack
from tests.ranks import leave_layout, run_with_env

LORA = LoraConfig(rank=4, alpha=6.0)
DROPPED = replace(LORA, dropout=0.3)
DENSE = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
}
MIXTURE = {
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2_whole_experts": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1),
    "tp2_ep2": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1, expert=2),
    "ep2": ParallelConfig(data=2, expert=2),
    "cp2_ep2": ParallelConfig(context=2, expert=2),
}
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class Drawn(FirstAdapters):
    """Adapters that change something."""

    def read(self, name, *, dim=0, start=0, stop=None):
        whole = self._drawn(name, self._shapes[name])
        return whole.narrow(dim, start, (whole.shape[dim] if stop is None else stop) - start)


def lora_student(
    folder: str,
    layout: ParallelConfig,
    *,
    lora: LoraConfig = LORA,
    dtype: str = "float32",
    drawn: bool = True,
    model: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
):
    """A learner with adapters, and its rank."""
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.lora import LoraModel
    from megatron_tropd.mcore.student import Student
    from megatron_tropd.mcore.weights import fill

    ranks, source = parallel.initialize(layout, seed=1), HFFolder(Path(folder))
    kind = models.resolve_dtype(dtype)
    built = models.build_model(
        source, layout=ranks, parallel=layout, dtype=kind, options=model,
        padded_vocab_size=models.padded_vocab_size(source.config, tensor=layout.tensor),
    )  # fmt: skip
    weights = LoraModel(built, lora, seed=3)
    if drawn:
        fill(weights.trainable(), weights.entries, weights.shape, Drawn(weights.entries, 5), ranks)
    megatron = MegatronConfig(model=model or {}, ddp=ddp or {})
    return (
        Student(weights, train=TRAIN, parallel=layout, dtype=kind, megatron=megatron),
        ranks,
    )


def batches_of(ranks, step: int):
    packed = pack(
        recorded_trajectories(step),
        dp_rank=ranks.dp_rank, dp_size=ranks.dp_size,
        tokens_per_micro_batch=128, pad_multiple=4, batch_multiple=ranks.batch_multiple,
        seed=0, step=step,
    )  # fmt: skip
    return [ranks.local(batch) for batch in packed]


def steps(learner, ranks, first: int, last: int) -> list[float]:
    from megatron_tropd.mcore.schedule import cross_entropy

    norms = []
    for step in range(first, last):
        learner.forward_backward(batches_of(ranks, step), cross_entropy)
        norms.append(learner.update().grad_norm)
    return norms


def first_gradients(learner, ranks) -> dict[str, torch.Tensor]:
    """The loss of all ranks, and whole gradients by PEFT's names, on rank 0."""
    import torch.distributed as dist

    from megatron_tropd.mcore.schedule import cross_entropy
    from megatron_tropd.mcore.weights import export_entries

    reports = learner.forward_backward(batches_of(ranks, 0), cross_entropy)
    weights = learner.model
    loss = torch.zeros(2, dtype=torch.float64)
    if ranks.tp_rank == 0:
        for report in reports:
            loss += torch.stack([value.double().sum() for value in report.values()])[:2]
    dist.all_reduce(loss)
    found = {name: p.main_grad for name, p in weights.trainable().items()}
    stream = export_entries(found, weights.entries, weights.shape, ranks)
    return {"loss": loss} | {n: t.clone() for n, t in stream if t is not None}


def _all_gradients(folder: str, layouts: dict[str, ParallelConfig], out: str, options) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name, layout in layouts.items():
        learner, ranks = lora_student(folder, layout, model=options)
        assert all(
            n.requires_grad == ("adapter" in k) for k, n in learner.module.named_parameters()
        )
        found = first_gradients(learner, ranks)
        found["norms"] = torch.tensor(steps(learner, ranks, 0, 3))
        if dist.get_rank() == 0:
            torch.save(found, Path(out, f"{name}.pt"))
        leave_layout()


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_losses_and_gradients_are_those_of_one_rank(tmp_path, tiny_model, family) -> None:
    mixture = family == "qwen3_moe"
    sizes = {} if mixture else {"tie_word_embeddings": True}
    model, layouts = str(tiny_model(family, **sizes)), MIXTURE if mixture else DENSE
    run_with_env(1, _all_gradients, model, {"one": ParallelConfig()}, str(tmp_path), None)
    run_with_env(
        1, _all_gradients, model, {"recomputed": ParallelConfig()}, str(tmp_path), RECOMPUTED
    )
    run_with_env(2, _all_gradients, model, layouts, str(tmp_path), None)
    one = torch.load(tmp_path / "one.pt")
    assert all(tensor.abs().max() > 0 for tensor in one.values())
    for name in (*layouts, "recomputed"):
        other = torch.load(tmp_path / f"{name}.pt")
        assert other.keys() == one.keys()
        for key, expected in one.items():
            room = 1e-5 * expected.abs().max()
            assert (other[key] - expected).abs().max() <= room, (name, key)


def _export(folder: str, layout: ParallelConfig, out: str) -> None:
    """Our hidden states of a batch, the merged folder and the adapter's, from drawn adapters."""
    import torch.distributed as dist

    from megatron_tropd.mcore.export import save_adapter, save_hf

    dist.init_process_group("gloo")
    learner, ranks = lora_student(folder, layout)
    source = HFFolder(Path(folder))
    save_hf(learner.model, source, Path(out, "merged"))
    save_adapter(learner.model, folder, Path(out, "adapter"))
    logits = {}
    for name in ("adapted", "base"):
        with learner.model.base_only() if name == "base" else torch.no_grad(), torch.no_grad():
            learner.module.eval()
            logits[name] = learner.module(IDS, torch.arange(IDS.shape[1])[None], None)
    if ranks.tp_rank == 0:  # its half of the vocabulary
        torch.save(logits, Path(out, "logits.pt"))


IDS = torch.tensor([[1, 5, 9, 200, 100, 31, 32, 33, 77, 250]])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_merged_folder_and_adapter_folder_give_our_logits(tmp_path, tiny_model, family) -> None:
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    folder = str(tiny_model(family))
    mixture = family in ("mixtral", "qwen3_moe")
    layout = ParallelConfig(tensor=2, sequence_parallel=mixture)
    run_with_env(2, _export, folder, layout, str(tmp_path))
    ours = torch.load(tmp_path / "logits.pt")
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        plain = base(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", attn_implementation="eager"
        )(IDS).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits
    columns = ours["base"].shape[-1]
    room = 1e-5 * plain.abs().max()
    assert (merged - plain).abs().max() > 1000 * room
    assert (adapted - merged).abs().max() <= room
    assert (ours["adapted"] - merged[..., :columns]).abs().max() <= room
    assert (ours["base"] - plain[..., :columns]).abs().max() <= room


RESUMED = (
    ParallelConfig(tensor=2, distributed_optimizer=True),
    ParallelConfig(data=2, distributed_optimizer=True),
    ParallelConfig(pipeline=2, distributed_optimizer=True),
)

ACROSS = ParallelConfig(context=2, distributed_optimizer=True)


def _train_and_resume(folder: str, mixture: str, out: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    _move(folder, RESUMED, "bfloat16", Path(out, "bf16"))
    _move(folder, (RESUMED[0], ACROSS), "float32", Path(out, "fp32"))
    _move(folder, RESUMED[:1], "float32", Path(out, "dropout"), lora=DROPPED)
    _move(mixture, (MIXTURE["tp2_sp"], MIXTURE["ep2"]), "float32", Path(out, "mixture"))


def _move(folder: str, layouts, dtype: str, out: Path, lora: LoraConfig = LORA) -> None:
    """Save under the first layout, resume under all of them."""
    learner, ranks = lora_student(folder, layouts[0], dtype=dtype, lora=lora)
    frozen = _frozen(learner)
    steps(learner, ranks, 0, 2)
    _saved(_checkpoints(out, ranks, layouts[0]), learner, 2)
    _check_saved(out / "step_000002")
    expected = steps(learner, ranks, 2, 5)
    assert all(torch.equal(p, frozen[name]) for name, p in _frozen(learner).items())
    trained = learner.model.trainable().items()
    assert {name for name, p in learner.module.named_parameters() if hasattr(p, "main_grad")} == {
        name for name, _ in trained
    }
    leave_layout()
    for layout in layouts:
        again, ranks = lora_student(folder, layout, dtype=dtype, lora=lora, drawn=False)
        _checkpoints(out, ranks, layout).load(again, 2)
        found = steps(again, ranks, 2, 5)
        if layout == layouts[0]:
            assert found == expected
        else:
            room = 1e-4 if dtype == "float32" else 2e-2
            assert found == pytest.approx(expected, rel=room), layout
        leave_layout()


def _frozen(learner) -> dict[str, torch.Tensor]:
    named = learner.module.named_parameters()
    return {name: p.detach().clone() for name, p in named if not p.requires_grad}


def _check_saved(folder: Path) -> None:
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    names = [n for n in load_sharded_metadata(str(folder)) if "decoder" in n or "embedding" in n]
    assert names and all("adapter" in name for name in names), names


def test_adapters_alone_are_trained_and_saved_and_resume_anywhere(tmp_path, tiny_model) -> None:
    folder = str(tiny_model("llama", num_key_value_heads=4))
    run_with_env(2, _train_and_resume, folder, str(tiny_model("mixtral")), str(tmp_path))


def _begin_as_the_base(folder: str) -> None:
    import torch.distributed as dist

    from megatron_tropd.convert.hf_folder import HFFolder

    dist.init_process_group("gloo")
    learner, ranks = lora_student(folder, ParallelConfig(tensor=2), drawn=False)
    weights, source = learner.model, HFFolder(Path(folder))
    for name, tensor in weights.exported():
        assert tensor is None or torch.equal(tensor, source.read(name)), name
    batches = batches_of(ranks, 0)
    adapted = learner.score(batches)
    with weights.base_only():
        base = learner.score(batches)
    assert all(map(torch.equal, adapted, base))
    steps(learner, ranks, 0, 2)
    changed = learner.score(batches)
    with weights.base_only():
        assert all(map(torch.equal, learner.score(batches), base))
    assert not any(map(torch.equal, changed, base))
    assert all(map(torch.equal, learner.score(batches), changed))
    weights.load(source)
    assert all(map(torch.equal, learner.score(batches), changed))


def test_a_student_begins_as_its_base_and_can_run_as_it(tiny_model) -> None:
    run_with_env(2, _begin_as_the_base, str(tiny_model("qwen3")))


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def _drop(folder: str, mixture: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    tp2 = ParallelConfig(tensor=2, distributed_optimizer=True)
    sharded = replace(tp2, sequence_parallel=True)
    _check_dropout(folder, tp2)
    _check_dropout(folder, sharded)
    _check_dropout(mixture, sharded)
    _check_dropout(mixture, ParallelConfig(data=2, expert=2, distributed_optimizer=True))


def _check_dropout(folder: str, layout: ParallelConfig) -> None:
    """Inputs are dropped alike where they are the same, and again when they are recomputed."""
    norms = {}
    for name, options in {"kept": {}, "recomputed": RECOMPUTED, "none": {}}.items():
        lora = LORA if name == "none" else DROPPED
        learner, ranks = lora_student(folder, layout, lora=lora, ddp=OVERLAP, model=options)
        norms[name] = steps(learner, ranks, 0, 3)
        _check_shared(learner, ranks)
        hidden, batches = [], batches_of(ranks, 0)
        for _ in range(2):
            hidden.append(learner.score(batches))
        assert all(map(torch.equal, *hidden))
        leave_layout()
    assert norms["kept"] == pytest.approx(norms["recomputed"], rel=1e-5)
    assert norms["kept"] != pytest.approx(norms["none"], rel=1e-2)


def _check_shared(learner, ranks) -> None:
    """What several ranks have whole is still the same on all of them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    for name, adapter in learner.model.adapters().items():
        of_experts = parallel_state.get_expert_tensor_parallel_group()
        group = of_experts if adapter.is_expert else ranks.tp_group
        first = adapter.shared.detach().clone()
        dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
        assert torch.equal(first, adapter.shared), name


def test_dropout_is_the_same_for_ranks_that_share_an_input(tiny_model) -> None:
    run_with_env(2, _drop, str(tiny_model("llama")), str(tiny_model("mixtral")))
