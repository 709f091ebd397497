"""Mixtures of experts: transformers' routing, the same training and checkpoints in every layout.

A Qwen3-MoE student learns from a Mixtral teacher: with expert parallelism the tokens of one replica
are computed by another, for both models at once.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_with_env
from test_checkpoint import _checkpoints, _some_steps, _student
from test_training import STEPS, _train
from transformers import AutoModelForCausalLM

from megatron_tropd.config import ParallelConfig

EXPERT = {"data": 2, "expert": 2}
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2_distributed_optimizer": ParallelConfig(data=2, distributed_optimizer=True),
    "ep2": ParallelConfig(**EXPERT),
    "ep2_distributed_optimizer": ParallelConfig(**EXPERT, distributed_optimizer=True),
    "tp2_ep2": ParallelConfig(tensor=2, sequence_parallel=True, **EXPERT),
    "pp2_ep2": ParallelConfig(pipeline=2, **EXPERT),
    "ep2_dp4": ParallelConfig(data=4, expert=2, distributed_optimizer=True),
}
OTHERS = [name for name in LAYOUTS if name != "tp1"]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_and_their_weights_are_those_of_transformers(
    family: str, normalized: bool, tiny_model: Callable[..., Path]
) -> None:
    if family == "mixtral" and not normalized:
        pytest.skip("Mixtral's weights always sum to 1")
    overrides = {} if family == "mixtral" else {"norm_topk_prob": normalized}
    run_with_env(1, _compare_routing, tiny_model(family, **overrides), normalized)


def _compare_routing(folder: Path, normalized: bool) -> None:
    learner, _ = _student(str(folder), ParallelConfig())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def keep_theirs(module, inputs, output) -> None:
        logits, weights, chosen = output
        found["theirs"].append(torch.zeros_like(logits).scatter(1, chosen, weights))

    for layer in learner.model.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda m, i, out: found["ours"].append(out[0]))
    for layer in theirs.model.layers:
        layer.mlp.gate.register_forward_hook(keep_theirs)
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        learner.model.eval()(ids, torch.arange(40)[None], None)
        theirs(ids)
    ours, expected = torch.stack(found["ours"]), torch.stack(found["theirs"])
    assert ours.shape == expected.shape
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.sum(-1), torch.ones(())) == normalized


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A Qwen3-MoE student and a Mixtral teacher, six experts each."""
    return tiny_model("qwen3_moe", norm_topk_prob=False), tiny_model("mixtral", seed=5)


def _train_all(pair: tuple[Path, Path], names: list[str], out: Path) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    for name in names:
        history = _train(str(pair[0]), str(pair[1]), LAYOUTS[name], "float32", "tropd")
        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            (out / name).write_text(json.dumps(history))


@pytest.fixture(scope="module")
def histories(tmp_path_factory, pair) -> dict[str, torch.Tensor]:
    """Layout -> [steps, 5], as test_training has them."""
    out = tmp_path_factory.mktemp("histories")
    for world_size in (1, 2, 4):
        names = [name for name, layout in LAYOUTS.items() if layout.world_size == world_size]
        run_with_env(world_size, _train_all, pair, names, out)
    return {name: torch.tensor(json.loads((out / name).read_text())) for name in LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("layout", OTHERS)
def test_distilling_a_mixture_does_not_depend_on_the_layout(layout: str, histories) -> None:
    assert histories[layout].shape == (STEPS, 5)
    torch.testing.assert_close(histories[layout], histories["tp1"], rtol=1e-4, atol=1e-6)


def test_distilling_a_mixture_brings_it_closer_to_the_teacher(histories) -> None:
    reverse_kl = histories["tp1"][:, 3]
    assert reverse_kl[-3:].mean() < 0.97 * reverse_kl[0]


def _save_and_move(folder: str, out: Path, distributed_optimizer: bool) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    option = {"distributed_optimizer": distributed_optimizer}
    layouts = [ParallelConfig(**EXPERT, **option), ParallelConfig(data=2, **option)]
    if not distributed_optimizer:
        layouts += [LAYOUTS["tp2"], LAYOUTS["pp2"]]
    norms = {}
    for n, writer in enumerate(layouts[:2]):
        learner, ranks = _student(folder, writer)
        _some_steps(learner, ranks, 0, 2)
        _checkpoints(out / str(n), ranks, writer).save(learner, step=2, extra={})
        norms[f"{n} uninterrupted"] = _some_steps(learner, ranks, 2, 4)
        parallel_state.destroy_model_parallel()
        for reader in layouts:
            learner, ranks = _student(folder, reader)
            _checkpoints(out / str(n), ranks, reader).load(learner, 2)
            norms[f"{n} {reader}"] = _some_steps(learner, ranks, 2, 4)
            parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        expected = torch.tensor(norms["0 uninterrupted"])
        for name, found in norms.items():
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=0, msg=name)
        assert norms[f"0 {layouts[0]}"] == norms["0 uninterrupted"]


@pytest.mark.slow
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_checkpoints_of_a_mixture_move_between_layouts(
    distributed_optimizer: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run_with_env(2, _save_and_move, str(tiny_model("qwen3_moe")), tmp_path, distributed_optimizer)
