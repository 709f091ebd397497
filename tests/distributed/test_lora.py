"""Adapters are the same function, gradients and training under every layout, and the base is still.

The adapters here are drawn by name, B included, so that every layout has the same ones and no
gradient is zero. Gradients are put together as an export puts weights together.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import TRAIN, recorded_trajectories

from megatron_tropd.config import LoraConfig, MegatronConfig, ParallelConfig
from megatron_tropd.convert.adapters import FirstAdapters
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.packing import pack
from tests.ranks import leave_layout, run_with_env

LORA = LoraConfig(rank=4, alpha=6.0)
DENSE = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
}
MIXTURE = {
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2_whole_experts": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1),
    "tp2_ep2": ParallelConfig(tensor=2, sequence_parallel=True, expert_tensor=1, expert=2),
    "ep2": ParallelConfig(data=2, expert=2),
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
        source, ranks=ranks, parallel=layout, dtype=kind, options=model,
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
    return pack(
        recorded_trajectories(step),
        dp_rank=ranks.dp_rank, dp_size=ranks.dp_size,
        tokens_per_micro_batch=128, pad_multiple=2, seed=0, step=step,
    )  # fmt: skip


def steps(learner, ranks, first: int, last: int) -> list[float]:
    from megatron_tropd.mcore.schedule import cross_entropy

    return [
        learner.train_step(batches_of(ranks, step), cross_entropy).grad_norm
        for step in range(first, last)
    ]


def first_gradients(learner, ranks) -> dict[str, torch.Tensor]:
    """The loss of all ranks, and whole gradients by PEFT's names, on rank 0."""
    import torch.distributed as dist

    from megatron_tropd.mcore.schedule import cross_entropy
    from megatron_tropd.mcore.weights import export_entries

    reports = learner.forward_backward(batches_of(ranks, 0), cross_entropy)
    weights = learner.weights
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
