"""The peers' rows of ``loss.py``: losses other projects release, each called as it ships.

Imported by ``loss_cases.py``; a peer itself is imported when its row is built, in the environment
of ``requirements-loss-peers.txt`` (which names ``requests`` because ModelOpt imports it without
asking for it). None of them takes a policy gradient's region or an exact
TrOPD; what they share with ours is a divergence over the whole vocabulary, or its top-k.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from loss_cases import TOP_K, Case, Inputs, LogitsLoss, from_logits
from torch import Tensor

MEGATRON, MODELOPT, LIGER, TRL = "megatron-core", "nvidia-modelopt", "liger-kernel", "trl"
PACKAGES = (MEGATRON, MODELOPT, LIGER, TRL, "torch", "transformers")
"""Whose versions are recorded."""
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""Liger's and TRL's name for a divergence; the mixture of jsd is the same as ours at 1/2."""
CHUNKED = ("reverse_kl", "jsd")
"""Divergences of their chunked losses that are run; the forward KL is left out to save time."""


def peer_cases() -> list[Case]:
    """Every row of a peer, in the order of the table."""
    return [*megatron_cases(), *modelopt_cases(), *liger_cases(), *trl_cases()]


def build_peer(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """A peer's row, ready to be called."""
    builders: dict[str, Callable[[Case, Inputs], Callable[[], Tensor]]] = {
        MEGATRON: build_megatron,
        MODELOPT: build_modelopt,
        LIGER: build_liger,
        TRL: build_trl,
    }
    return builders[case.source](case, inputs)


def megatron_cases() -> list[Case]:
    """The loss every Megatron run has: no teacher in it, hence a yardstick."""
    return [
        Case(
            "megatron-core cross entropy",
            MEGATRON,
            "cross_entropy",
            "vocab_parallel_cross_entropy of the token, no teacher in the loss; from logits, which "
            "it overwrites (the teacher's are made, to do the same products)",
            large=True,
        )
    ]


def build_megatron(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Megatron-Core's vocabulary-parallel cross entropy."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def loss(student_Tv: Tensor, teacher_Tv: Tensor) -> Tensor:
        # [s, b, v] and [s, b], as Megatron has them.
        loss_T1 = vocab_parallel_cross_entropy(
            student_Tv[:, None], inputs.ids_T[:, None], tp_group=inputs.group
        )
        return loss_T1.mean()

    return from_logits(inputs, loss)


def modelopt_cases() -> list[Case]:
    """ModelOpt's losses for Megatron-Core, which know tensor parallelism."""
    whole = "LogitsKLLoss: {}, whole vocabulary; from logits, autograd"
    return [
        Case("ModelOpt forward_kl", MODELOPT, "forward_kl", whole.format("forward KL")),
        Case("ModelOpt reverse_kl", MODELOPT, "reverse_kl", whole.format("reverse KL")),
        Case(
            "ModelOpt top-k forward_kl",
            MODELOPT,
            "renormalised_forward_kl",
            f"TopKLogitsKLLoss: forward KL, both renormalised on the teacher's top-{TOP_K}; "
            "from logits",
        ),
    ]


def build_modelopt(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """ModelOpt's ``LogitsKLLoss`` or ``TopKLogitsKLLoss``, reduced as Megatron-LM reduces it."""
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    size = inputs.group.size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = SimpleNamespace(tensor_model_parallel_size=size, sequence_parallel=False)
    if "top-k" in case.name:
        criterion = TopKLogitsKLLoss(config, top_k=TOP_K)
    else:
        criterion = LogitsKLLoss(config, reverse=case.divergence == "reverse_kl")

    def loss(student_Tv: Tensor, teacher_Tv: Tensor) -> Tensor:
        loss_1T, sum_over_ranks, _ = criterion(student_Tv[:, None], teacher_Tv[:, None])
        total = loss_1T.mean()
        if sum_over_ranks and size > 1:
            # The value only: each rank's gradient is that of its own part.
            value = total.detach().clone()
            dist.all_reduce(value, group=inputs.group)
            total = total + (value - total.detach())
        return total

    return from_logits(inputs, loss)


def liger_cases() -> list[Case]:
    """Liger's chunked distillation loss in PyTorch, and its Triton kernel."""
    text = "LigerFusedLinearJSDLoss, {}: chunks of 1024 tokens, gradient made in forward; no TP"
    cases = [
        Case(
            f"Liger {divergence}",
            LIGER,
            divergence,
            text.format("torch.compile"),
            sharded=False,
            compiles=True,
        )
        for divergence in CHUNKED
    ]
    eager = "Liger reverse_kl, not compiled"
    cases.append(Case(eager, LIGER, "reverse_kl", text.format("eager"), sharded=False))
    kernel = "LigerFusedLinearJSD: the Triton kernel, for GPUs; no TP"
    cases.append(Case("Liger Triton jsd", LIGER, "jsd", kernel, sharded=False))
    return cases


def build_liger(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Liger's chunked loss without its cross-entropy term, or its Triton kernel."""
    if "Triton" in case.name:
        return build_liger_triton(inputs)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[case.divergence],
        compiled=case.compiles,
    )

    def run() -> Tensor:
        return criterion(
            inputs.hidden_TH,
            inputs.weight_vH,
            inputs.teacher_hidden_TH,
            inputs.teacher_weight_vH,
            inputs.ids_T,
        )

    return run


def build_liger_triton(inputs: Inputs) -> Callable[[], Tensor]:
    """Liger's fused kernel; where Triton has no device the call raises, which the row then says."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=BETAS["jsd"])
    teacher = inputs.teacher_hidden_TH, inputs.teacher_weight_vH
    return lambda: criterion(*inputs.leaves, *teacher, inputs.ids_T)


def trl_cases() -> list[Case]:
    """The loss of TRL's ``DistillationTrainer``, and the one of its ``GKDTrainer``."""
    text = (
        "ChunkedDivergenceFunction (DistillationTrainer): tiles of 4096 tokens x 32768 columns, "
        "logits made again in backward; no TP"
    )
    cases = [Case(f"TRL {name}", TRL, name, text, sharded=False) for name in CHUNKED]
    gkd = "GKDTrainer.generalized_jsd_loss: from logits, autograd; no TP"
    return [*cases, Case("TRL GKD jsd", TRL, "jsd", gkd, sharded=False)]


def build_trl(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """TRL's chunked divergence, or the generalised JSD of its GKD trainer."""
    beta = BETAS[case.divergence]
    if "GKD" in case.name:
        return from_logits(inputs, gkd_loss(beta))
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Tensor:
        divergence_T, _ = ChunkedDivergenceFunction.apply(
            inputs.hidden_TH,
            inputs.weight_vH,
            None,
            inputs.teacher_hidden_TH,
            inputs.teacher_weight_vH,
            None,
            beta,
        )
        return divergence_T.mean()

    return run


def gkd_loss(beta: float) -> LogitsLoss:
    """TRL's generalised JSD, averaged over the tokens."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(student_Tv: Tensor, teacher_Tv: Tensor) -> Tensor:
        logits: list[Any] = [student_Tv[None], teacher_Tv[None]]
        return GKDTrainer.generalized_jsd_loss(*logits, beta=beta, reduction="sum") / len(
            student_Tv
        )

    return loss
