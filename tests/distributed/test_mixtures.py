"""Mixtures of experts: transformers' routing, the same training and checkpoints in every layout.

A Qwen3-MoE student learns from a Mixtral teacher: with expert parallelism the tokens of one replica
are computed by another, for both models at once. A dense student has its replicas to itself.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import _checkpoints, _saved, _some_steps, _student
from test_training import STEPS, _train
from transformers import AutoModelForCausalLM

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.families import plan
from megatron_tropd.convert.hf_folder import HFFolder
from tests.ranks import leave_layout, run_with_env

EXPERT = {"data": 2, "expert": 2}
WHOLE = {"tensor": 2, "sequence_parallel": True, "expert_tensor": 1}
"""Experts that tensor parallelism does not shard."""
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2_distributed_optimizer": ParallelConfig(data=2, distributed_optimizer=True),
    "ep2": ParallelConfig(**EXPERT),
    "cp2_ep2": ParallelConfig(context=2, expert=2, distributed_optimizer=True),
    "ep2_distributed_optimizer": ParallelConfig(**EXPERT, distributed_optimizer=True),
    "tp2_ep2": ParallelConfig(tensor=2, sequence_parallel=True, **EXPERT),
    "pp2_ep2": ParallelConfig(pipeline=2, **EXPERT),
    "ep2_dp4": ParallelConfig(data=4, expert=2, distributed_optimizer=True),
    "tp2_whole": ParallelConfig(**WHOLE),
    "tp2_whole_ep2": ParallelConfig(**WHOLE, expert=2),
    "tp2_whole_ep2_distributed_optimizer": ParallelConfig(
        **WHOLE, **EXPERT, distributed_optimizer=True
    ),
}


def test_experts_and_their_weights_are_those_of_transformers(tiny_model) -> None:
    cases = [
        (tiny_model("mixtral"), True),
        (tiny_model("qwen3_moe"), True),
        (tiny_model("qwen3_moe", norm_topk_prob=False), False),
    ]
    run_with_env(1, _compare_all_routing, cases)


def _compare_all_routing(cases: list[tuple[Path, bool]]) -> None:
    from megatron_tropd.mcore import parallel

    for folder, normalized in cases:
        _compare_routing(folder, normalized)
        parallel.shutdown()


def _compare_routing(folder: Path, normalized: bool) -> None:
    learner, _ = _student(str(folder), ParallelConfig())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}

    def keep_theirs(module, inputs, output) -> None:
        logits, weights, chosen = output
        found["theirs"].append(torch.zeros_like(logits).scatter(1, chosen, weights))

    for layer in learner.module.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda m, i, out: found["ours"].append(out[0]))
    for layer in theirs.model.layers:
        layer.mlp.gate.register_forward_hook(keep_theirs)
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        learner.module.eval()(ids, torch.arange(40)[None], None)
        theirs(ids)
    ours, expected = torch.stack(found["ours"]), torch.stack(found["theirs"])
    assert ours.shape == expected.shape
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours.sum(-1), torch.ones(())) == normalized


@pytest.mark.parametrize(
    "name", ["mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1"]
)
def test_experts_are_found_in_both_of_megatrons_modules(name: str, tiny_model) -> None:
    """Transformer Engine's grouped experts are weights of one module; it cannot run here."""
    from megatron_tropd.mcore.weights import _name

    entries = plan(HFFolder(tiny_model("qwen3_moe", num_hidden_layers=3)).config)
    (entry,) = (e for e in entries if (e.layer, e.expert) == (2, 4) and "linear_fc2" in e.name)
    parameters = [f"decoder.layers.2.{name}"]
    found = _name(entry, parameters, first_expert=3)
    assert [found] == parameters


Run = tuple[str, str, str]
"""Layout, dtype, student."""
RUNS = [
    *((name, "float32", "qwen3_moe") for name in LAYOUTS),
    ("ep2_distributed_optimizer", "bfloat16", "qwen3_moe"),
    ("tp1", "float32", "llama"),
    ("ep2", "float32", "llama"),
]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> dict[str, Path]:
    """The teacher, a mixture of six experts, and two students, one of them a mixture too."""
    return {
        "qwen3_moe": tiny_model("qwen3_moe", norm_topk_prob=False),
        "llama": tiny_model("llama", tie_word_embeddings=True),
        "teacher": tiny_model("mixtral", seed=5),
    }


def _train_all(models: dict[str, Path], runs: list[Run], out: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for run in runs:
        layout, dtype, student = run
        history = _train(
            str(models[student]), str(models["teacher"]), LAYOUTS[layout], dtype, "tropd"
        )
        leave_layout()
        if dist.get_rank() == 0:
            (out / "-".join(run)).write_text(json.dumps(history))


@pytest.fixture(scope="module")
def histories(tmp_path_factory, models) -> dict[Run, torch.Tensor]:
    """Run -> [steps, 5], the first that test_training has."""
    out = tmp_path_factory.mktemp("histories")
    for world_size in (1, 2, 4):
        runs = [run for run in RUNS if LAYOUTS[run[0]].world_size == world_size]
        run_with_env(world_size, _train_all, models, runs, out)
    return {run: torch.tensor(json.loads((out / "-".join(run)).read_text()))[:, :5] for run in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_distilling_mixtures_does_not_depend_on_the_layout(run: Run, histories) -> None:
    expected = histories["tp1", "float32", run[2]]
    assert expected.shape == (STEPS, 5)
    # bfloat16 keeps 8 bits: the mask draws of a few tokens flip, the means stay close.
    tolerance = (1e-4, 1e-6) if run[1] == "float32" else (0.15, 0.05)
    torch.testing.assert_close(histories[run], expected, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.slow
def test_distilling_a_mixture_brings_it_closer_to_the_teacher(histories) -> None:
    reverse_kl = histories["tp1", "float32", "qwen3_moe"][:, 3]
    assert reverse_kl[-3:].mean() < 0.97 * reverse_kl[0]


def _save_and_move(folder: str, out: Path, distributed_optimizer: bool) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    option = {"distributed_optimizer": distributed_optimizer}
    layouts = [ParallelConfig(**EXPERT, **option), ParallelConfig(data=2, **option)]
    if not distributed_optimizer:
        layouts += [LAYOUTS["tp2"], LAYOUTS["pp2"]]
    layouts.append(ParallelConfig(**WHOLE, expert=2, **option))
    norms = {}
    for n, writer in enumerate(layouts[:2]):
        learner, ranks = _student(folder, writer)
        _some_steps(learner, ranks, 0, 2)
        _saved(_checkpoints(out / str(n), ranks, writer), learner, 2)
        norms[f"{n} uninterrupted"] = _some_steps(learner, ranks, 2, 4)
        leave_layout()
        for reader in layouts:
            learner, ranks = _student(folder, reader)
            _checkpoints(out / str(n), ranks, reader).load(learner, 2)
            norms[f"{n} {reader}"] = _some_steps(learner, ranks, 2, 4)
            leave_layout()
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
