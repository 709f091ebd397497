"""Megatron's options change memory and time, not what is learnt.

Every option that runs without CUDA trains for a few steps under tensor, pipeline, sequence, data
and expert parallelism. Losses, gradients of all parameters, weights after each update (as engines
get them) and hidden states of a forward pass are compared with those of a run without options, on
every rank. An option that did nothing would pass such a comparison, so what it does is counted:
passes through attention and MLPs, buckets, reductions that began during the backward pass.
"""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from loss_settings import config_of
from test_training import recorded_trajectories

from megatron_tropd.config import MegatronConfig, ParallelConfig, TrainConfig
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

STEPS = 3
# With a small epsilon Adam makes as large a step of a gradient that is round-off as of any other.
TRAIN = TrainConfig(steps=STEPS, lr=1e-2, adam_eps=1e-3, tokens_per_micro_batch=64)
DENSE = ("qwen3", {"num_hidden_layers": 4})
TIED = ("llama", {"num_hidden_layers": 4, "tie_word_embeddings": True})
MIXTURE = ("qwen3_moe", {"num_hidden_layers": 2})
_TP2_SP_PP2 = ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)
_TP2_DP2 = ParallelConfig(tensor=2, data=2, distributed_optimizer=True)
_PP2_DP2 = ParallelConfig(pipeline=2, data=2)
_TP2_SP_EP2 = ParallelConfig(
    tensor=2, data=2, expert=2, sequence_parallel=True, distributed_optimizer=True
)
Model = tuple[str, dict[str, Any]]
"""Family and what is changed of its tiny model."""
SETTINGS: dict[str, tuple[ParallelConfig, Model, str]] = {
    "tp2_sp_pp2": (_TP2_SP_PP2, DENSE, "float32"),
    "tp2_sp_pp2_bf16": (_TP2_SP_PP2, DENSE, "bfloat16"),
    "tp2_dp2_spread": (_TP2_DP2, DENSE, "float32"),
    "tp2_dp2_spread_bf16": (_TP2_DP2, DENSE, "bfloat16"),
    "pp2_dp2_tied": (_PP2_DP2, TIED, "float32"),
    "pp2_dp2_spread_tied": (replace(_PP2_DP2, distributed_optimizer=True), TIED, "float32"),
    "tp2_sp_ep2_spread": (_TP2_SP_EP2, MIXTURE, "float32"),
}
"""Layout ("spread": its optimizer is distributed), student, type."""


def _full(method: str, layers: int) -> dict[str, Any]:
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


FULL = _full("uniform", 1)
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 20_000}
GATHER = OVERLAP | {"overlap_param_gather": True}
PADDED = {"pad_buckets_for_high_nccl_busbw": True}
ROUNDED = {"grad_reduce_in_fp32": False}
IN_FP32 = ROUNDED | {"reduce_scatter_with_fp32_accumulation": True}
ON_HOST = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "use_precision_aware_optimizer": True,
}
LATE = ROUNDED | {"param_name_patterns_for_fp32_local_accumulation": ["all"]}
RECOMPUTED = {
    "full_uniform": (FULL, {"attention": 2, "mlp": 2}),
    "full_uniform_by_two": (_full("uniform", 2), {"attention": 2, "mlp": 2}),
    "full_block": (_full("block", 1), {"attention": 1.5, "mlp": 1.5}),
    "attention": (_selective("core_attn"), {"attention": 2, "mlp": 1}),
    "mlp": (_selective("mlp"), {"attention": 1, "mlp": 2}),
    "both": (_selective("core_attn", "mlp"), {"attention": 2, "mlp": 2}),
}
"""Options of the model, and how often each module runs against a run without."""


@dataclass(frozen=True)
class Case:
    """One run with options."""

    setting: str
    name: str
    model: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    """Whether all numbers are bit for bit those without; else to round-off."""
    counts: dict[str, float] = field(default_factory=dict)
    """How often modules run, against a run without."""

    rounded: bool = False
    """Whether gradients are rounded to bfloat16 before they are summed over the replicas."""
    resumed: bool = False
    """Whether it begins with a checkpoint that a run without options has saved after a step."""

    @property
    def id(self) -> str:
        """Its name in files and reports."""
        return f"{self.setting}-{self.name}"

    @property
    def options(self) -> MegatronConfig:
        """As a config has them."""
        return MegatronConfig(model=self.model, ddp=self.ddp, optimizer=self.optimizer)


CASES = [
    *(
        Case("tp2_sp_pp2", name, model=model, counts=counts)
        for name, (model, counts) in RECOMPUTED.items()
    ),
    Case(
        "tp2_sp_pp2", "mlp_chunks", {"mlp_chunks_for_training": 2}, counts={"mlp": 2}, exact=False
    ),
    Case("tp2_sp_pp2", "activation_fusion", {"bias_activation_fusion": True}, exact=False),
    Case("tp2_sp_pp2", "residual_fusion", {"bias_dropout_fusion": True}),
    Case("tp2_sp_pp2", "no_clone", {"clone_scatter_output_in_embedding": False}),
    Case("tp2_sp_pp2", "plain_p2p", {"batch_p2p_comm": False}),
    Case("tp2_sp_pp2", "deterministic", {"deterministic_mode": True}, exact=False),
    Case("tp2_sp_pp2", "high_threshold", optimizer={"grad_norm_skip_threshold": 1e9}),
    Case("tp2_sp_pp2_bf16", "full", FULL, counts={"attention": 2, "mlp": 2}),
    Case("tp2_sp_pp2_bf16", "overlap", ddp=OVERLAP),
    Case("tp2_sp_pp2_bf16", "rounded", ddp=ROUNDED, exact=False, rounded=True),
    Case("tp2_sp_pp2_bf16", "rounded_at_last", ddp=LATE, exact=False, rounded=True),
    Case(
        "tp2_dp2_spread",
        "distributed_activations",
        FULL | {"distribute_saved_activations": True},
        counts={"attention": 2, "mlp": 2},
    ),
    # Other buckets are other shards of the optimizer, and another order of the norm's sum.
    Case("tp2_dp2_spread", "overlap", ddp=OVERLAP, exact=False),
    Case("tp2_dp2_spread", "gather", ddp=GATHER, exact=False),
    Case("tp2_dp2_spread", "padded", ddp=GATHER | PADDED, exact=False),
    Case(
        "tp2_dp2_spread",
        "gather_full",
        _full("block", 1),
        GATHER,
        counts={"attention": 1.25},
        exact=False,
    ),
    Case("tp2_dp2_spread", "resumed", FULL, GATHER, exact=False, resumed=True),
    Case("tp2_dp2_spread_bf16", "gather", ddp=GATHER, exact=False),
    Case("tp2_dp2_spread_bf16", "fp32_sums", ddp=IN_FP32, exact=False, rounded=True),
    Case("tp2_dp2_spread_bf16", "rounded", ddp=ROUNDED | GATHER, exact=False, rounded=True),
    Case("tp2_dp2_spread_bf16", "rounded_at_last", ddp=LATE, exact=False, rounded=True),
    Case(
        "tp2_dp2_spread_bf16",
        "overlapped_fp32_sums",
        ddp=OVERLAP | IN_FP32,
        exact=False,
        rounded=True,
    ),
    Case("tp2_dp2_spread_bf16", "optimizer_on_host", optimizer=ON_HOST, exact=False),
    Case("pp2_dp2_tied", "overlap", ddp=OVERLAP),
    Case("pp2_dp2_tied", "overlap_mlp", _selective("mlp"), OVERLAP, counts={"mlp": 2}),
    Case("pp2_dp2_spread_tied", "gather", ddp=GATHER, exact=False),
    Case("pp2_dp2_spread_tied", "gather_mlp", _selective("mlp"), GATHER, exact=False),
    Case("tp2_sp_ep2_spread", "full", FULL, counts={"attention": 2, "mlp": 2}),
    Case("tp2_sp_ep2_spread", "experts", _selective("moe"), counts={"attention": 1, "mlp": 2}),
    Case("tp2_sp_ep2_spread", "router_in_fp64", {"moe_router_dtype": "fp64"}, exact=False),
    Case("tp2_sp_ep2_spread", "gather", ddp=GATHER, exact=False),
    Case("tp2_sp_ep2_spread", "resumed", FULL, GATHER, exact=False, resumed=True),
]


def _train_all(models: dict[str, tuple[str, str]], cases: list[Case], out: str) -> None:
    """Every case beside the run without options of its layout, in one spawn of four ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {}
    for setting in SETTINGS:
        mine = [case for case in cases if case.setting == setting]
        if mine:
            checkpoints = Path(out).with_name(setting)
            found |= _compare_setting(setting, models[setting], mine, checkpoints)
            leave_layout()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))


def _compare_setting(
    setting: str, folders: tuple[str, str], cases: list[Case], checkpoints: Path
) -> dict[str, Any]:
    from megatron_tropd.mcore import parallel

    ranks = parallel.initialize(SETTINGS[setting][0], seed=1)
    bench = Bench(setting, folders, ranks, checkpoints)
    plain, plain_counts = bench.train(MegatronConfig(), save=any(c.resumed for c in cases))
    assert min(float(norm) for (norm,) in plain["norm"]) > 0
    found = {}
    for case in cases:
        with _own_reduce_scatter(), _parameters_of_cuda():
            numbers, counts = bench.train(case.options, resume=case.resumed)
        found[case.id] = _over_ranks(_differences(numbers, plain), counts, plain_counts)
    return found


@contextmanager
def _own_reduce_scatter():
    """Give later runs of this process Megatron's default: a DDP changes it for all."""
    from megatron.core.distributed import param_and_grad_buffer

    with mock.patch.object(
        param_and_grad_buffer,
        "dist_reduce_scatter_func",
        param_and_grad_buffer.dist_reduce_scatter_func,
    ):
        yield


@contextmanager
def _parameters_of_cuda():
    """Let Megatron's hybrid optimizer take what it is given for a GPU's, and copy it to the host.

    Without CUDA it finds nothing to copy, and fails in its first step.
    """
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    split = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def split_as_on_cuda(self: Any, fraction: float) -> Any:
        given = {id(p) for group in self.param_groups for p in group["params"]}
        is_cuda = property(lambda tensor: id(tensor) in given)
        with (
            mock.patch.object(torch.Tensor, "is_cuda", is_cuda),
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        ):
            groups = split(self, fraction)
        assert len(groups[2]) == len(given), "all have copies"
        return groups

    with mock.patch.object(
        HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", split_as_on_cuda
    ):
        yield


Numbers = dict[str, list[list[torch.Tensor]]]
"""Kind -> step -> tensors."""


def _differences(found: Numbers, plain: Numbers) -> dict[str, float]:
    """Largest difference of each kind of number, against the largest number of its tensor."""
    return {
        kind: max(
            (
                float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
                for step, expected in zip(steps, plain[kind][-len(steps) :], strict=True)
                for a, b in zip(step, expected, strict=True)
                if b.numel()
            ),
            default=0.0,
        )
        for kind, steps in found.items()
    }


def _over_ranks(
    differences: dict[str, float], counts: Counter[str], plain: Counter[str]
) -> dict[str, Any]:
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (differences, counts, plain))
    return {
        "differences": {kind: max(p[0][kind] for p in parts) for kind in differences},
        "counts": dict(sum((p[1] for p in parts), Counter())),
        "plain": dict(sum((p[2] for p in parts), Counter())),
    }


class Bench:
    """A layout, and the models and recorded sequences that it trains with any options."""

    def __init__(
        self, setting: str, folders: tuple[str, str], ranks, checkpoints: Path | None = None
    ) -> None:
        self.layout, _, self.dtype = SETTINGS[setting]
        self.folders, self.folder, self.ranks = folders, checkpoints, ranks
        self.trajectories = [recorded_trajectories(step) for step in range(STEPS)]

    def train(
        self, options: MegatronConfig, *, save: bool = False, resume: bool = False
    ) -> tuple[Numbers, Counter[str]]:
        """Numbers of every step, and how often things happened.

        Args:
            options: of Megatron's.
            save: a checkpoint after the first step.
            resume: from that checkpoint.
        """
        from megatron_tropd.distill.step import learn, micro_batches

        parts = build_parts(
            *self.folders,
            self.layout,
            TRAIN,
            # Without draws: they would turn round-off into other tokens.
            config_of(region="none", outlier="clip"),
            dtype=self.dtype,
            megatron=options,
            ranks=self.ranks,
            pad_multiple=2,
        )
        learner = parts.student
        counts = _count(learner)
        found: Numbers = {kind: [] for kind in ("loss", "norm", "grad", "weight")}
        update = learner.update

        def update_after_a_look() -> Any:
            found["grad"].append([p.main_grad.clone() for p in self._reduced(learner)])
            return update()

        learner.update = update_after_a_look
        if resume:
            self._checkpoints().load(learner, 1)
        for step in range(int(resume), STEPS):
            metrics = learn(parts, self.trajectories[step], step).metrics
            found["loss"].append([torch.tensor([metrics["loss"], metrics["reverse_kl"]])])
            found["norm"].append([torch.tensor(metrics["grad_norm"])])
            found["weight"].append([p.detach().clone() for p in learner.module.parameters()])
            if save and step == 0:
                checkpoints = self._checkpoints()
                checkpoints.save(learner, step=1, extra={})
                checkpoints.wait()
        kept = counts.copy()
        batches = micro_batches(parts, self.trajectories[0], 0)
        assert len(batches) > 1
        found["states"] = [learner.score(batches)]
        return found, kept

    def _checkpoints(self):
        from megatron_tropd.mcore.checkpoint import Checkpoints

        return Checkpoints(
            self.folder,
            keep=1,
            layout=self.ranks,
            distributed_optimizer=self.layout.distributed_optimizer,
            say=print,
        )

    def _reduced(self, learner) -> list[torch.nn.Parameter]:
        """The parameters whose gradients this rank has in full."""
        spread = self.layout.distributed_optimizer
        return [] if spread else list(learner.module.parameters())


def _count(learner) -> Counter[str]:
    """Count passes through modules, buckets, and reductions that begin in the backward pass."""
    counts: Counter[str] = Counter()

    def counting(kind: str):
        return lambda *_: counts.update([kind])

    for layer in learner.module.decoder.layers:
        layer.self_attention.core_attention.register_forward_hook(counting("attention"))
        getattr(layer.mlp, "experts", layer.mlp).register_forward_hook(counting("mlp"))
    (chunk,) = learner.chunks
    groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    counts["buckets"] = sum(len(group.buckets) for group in groups)
    finalize, backward = learner.module.config.finalize_model_grads_func, [True]

    def finalized(*args, **kwargs) -> None:
        backward[0] = False
        finalize(*args, **kwargs)
        backward[0] = True

    learner.module.config.finalize_model_grads_func = finalized
    for group in groups:
        group.start_grad_sync = _counted(group.start_grad_sync, counts, backward)
    return counts


def _counted(start, counts: Counter[str], backward: list[bool]):
    def call(*args, **kwargs):
        counts["early"] += backward[0]
        return start(*args, **kwargs)

    return call


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model) -> dict[str, Any]:
    """Case -> largest differences over all ranks, and counts."""
    teacher = str(tiny_model("llama", hidden_size=96, seed=5))
    folders = {
        setting: (str(tiny_model(family, **changes)), teacher)
        for setting, (_, (family, changes), _) in SETTINGS.items()
    }
    out = tmp_path_factory.mktemp("options") / "found.json"
    run_with_env(4, _train_all, folders, CASES, str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_nothing_is_learnt_otherwise(case: Case, found) -> None:
    differences = found[case.id]["differences"]
    if case.exact:
        assert not any(differences.values()), differences
        return
    in_bfloat16 = SETTINGS[case.setting][2] == "bfloat16"
    limits = dict.fromkeys(differences, 1e-5)
    if in_bfloat16:  # a weight whose last bit differs
        limits |= {"weight": 2**-8, "states": 2**-5}
    if case.rounded:  # each micro-batch rounds, and later steps begin elsewhere
        limits |= {"grad": 2**-3, "norm": 2**-6, "loss": 2**-6, "weight": 2**-6}
    assert all(differences[kind] <= limit for kind, limit in limits.items()), differences


@pytest.mark.parametrize("case", [c for c in CASES if c.counts], ids=lambda case: case.id)
def test_what_is_not_kept_is_computed_again(case: Case, found) -> None:
    counts, plain = found[case.id]["counts"], found[case.id]["plain"]
    assert {kind: counts[kind] / plain[kind] for kind in case.counts} == case.counts


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.ddp.get("overlap_grad_reduce")], ids=lambda case: case.id
)
def test_reductions_begin_in_the_backward_pass(case: Case, found) -> None:
    counts, plain = found[case.id]["counts"], found[case.id]["plain"]
    assert not plain.get("early") and counts["early"] > 0
    assert counts["buckets"] > plain["buckets"]
