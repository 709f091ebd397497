"""The rows of ``loss.py``: their inputs, their dense definitions, our losses and the table.

Imports torch alone until a row says whose loss it is, so that the same file runs in this project's
environment and in the peers' (``loss_peers.py`` has their rows).

A row is a function that makes the mean loss over T tokens, differentiable with respect to the
student's hidden states and this rank's shard of the output layer. Everything from there to both
gradients is timed, whatever the row is given: a loss that takes logits has its logits made by a
matrix product inside the clock.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, H = hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOP_K = 64
"""Support of the top-k rows: TrOPD's default."""
LogitsLoss = Callable[[Tensor, Tensor], Tensor]
"""(student logits [T, v], teacher logits [T, v]) -> scalar."""


@dataclass(frozen=True)
class Case:
    """What a row is; :func:`build` makes it run."""

    name: str
    source: str
    """ours, dense, or the package it comes from."""
    divergence: str
    """Key of ``DIVERGENCES``: what the gradient is compared with."""
    computes: str
    """One line for the reader of the table."""
    sharded: bool = True
    """Whether it knows tensor parallelism; otherwise it runs at TP 1 only."""
    large: bool = False
    """Whether it also runs at the size of the memory target."""
    compiles: bool = False
    """Whether it uses torch.compile: its memory is that of its second call."""


@dataclass(frozen=True)
class Inputs:
    """The same for every row of a size."""

    hidden_TH: Tensor
    """[T, H] student, a leaf that requires a gradient"""
    weight_vH: Tensor
    """[v, H] student's output layer, a leaf that requires a gradient"""
    teacher_hidden_TH: Tensor
    """[T, H]"""
    teacher_weight_vH: Tensor
    """[v, H]"""
    ids_T: Tensor
    """[T] int64, all written by the student"""
    uniforms_T: Tensor
    """[T] float32 in [0, 1)"""
    group: dist.ProcessGroup
    """The ranks the vocabulary is sharded over, one or more."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden_TH.shape[0]

    @property
    def vocab(self) -> int:
        """V: no column is padding."""
        return self.weight_vH.shape[0] * self.group.size()

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gradients are taken of."""
        return self.hidden_TH, self.weight_vH


def make_inputs(
    tokens: int, columns: int, hidden: int, dtype: torch.dtype, group: dist.ProcessGroup
) -> Inputs:
    """Two correlated models with logits of standard deviation 3.

    Args:
        tokens: T.
        columns: v.
        hidden: H.
        dtype: of hidden states and weights.
        group: the ranks.

    Returns:
        The inputs; tokens are the same on every rank, weights are each rank's own.
    """
    common = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(2 + group.rank())

    def pair(rows: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        student = scale * torch.randn(rows, hidden, generator=generator)
        teacher = 0.9 * student + 0.44 * scale * torch.randn(rows, hidden, generator=generator)
        return student.to(dtype).requires_grad_(), teacher.to(dtype)

    hidden_TH, teacher_hidden_TH = pair(tokens, 1.0, common)
    weight_vH, teacher_weight_vH = pair(columns, 3.0 / hidden**0.5, own)
    ids_T = torch.randint(columns * group.size(), (tokens,), generator=common)
    uniforms_T = torch.rand(tokens, generator=common)
    return Inputs(
        hidden_TH, weight_vH, teacher_hidden_TH, teacher_weight_vH, ids_T, uniforms_T, group
    )


# --- Dense definitions: the reference of every gradient, and the dense rows ----------------------


def policy_gradient(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """OPD: the gradient of ``-sg(r(x)) log q(x)``, r = log p - log q. [T]"""
    log_q_T = log_q_TV.gather(1, inputs.ids_T[:, None]).squeeze(1)
    log_p_T = log_p_TV.gather(1, inputs.ids_T[:, None]).squeeze(1)
    return -(log_p_T - log_q_T).detach() * log_q_T


def top_forward_kl(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """``sum_{top-k of p} p (log p - log q)``, not renormalised. [T]"""
    log_p_TK, ids_TK = log_p_TV.topk(TOP_K, dim=-1)
    return (log_p_TK.exp() * (log_p_TK - log_q_TV.gather(1, ids_TK))).sum(-1)


def forward_kl(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """``sum p (log p - log q)``. [T]"""
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def reverse_kl(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """``sum q (log q - log p)``. [T]"""
    return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(-1)


def jsd(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """``(KL(p || m) + KL(q || m)) / 2`` with m = (p + q) / 2. [T]"""
    log_m_TV = torch.logaddexp(log_q_TV, log_p_TV) - torch.log(torch.tensor(2.0))
    return 0.5 * (forward_kl(log_m_TV, log_p_TV, inputs) + forward_kl(log_m_TV, log_q_TV, inputs))


def tropd(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """TrOPD: OPD where ``u < p(x) / q(x)``, else the forward KL on the teacher's top-k. [T]"""
    ratio_T = (log_p_TV - log_q_TV).gather(1, inputs.ids_T[:, None]).squeeze(1).exp().detach()
    sampled_T = policy_gradient(log_q_TV, log_p_TV, inputs)
    outlier_T = top_forward_kl(log_q_TV, log_p_TV, inputs)
    return torch.where(inputs.uniforms_T < ratio_T, sampled_T, outlier_T)


def tropd_exact(
    log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs, outlier: Any = forward_kl
) -> Tensor:
    """``-sum_v sg(min(p, q) r) log q + sg(TV) F``, TV = 1 - sum min(p, q). [T]"""
    least_TV = torch.minimum(log_p_TV, log_q_TV).exp()
    trust_TV = (least_TV * (log_p_TV - log_q_TV)).detach()
    outside_T = (1 - least_TV.sum(-1)).detach()
    return outside_T * outlier(log_q_TV, log_p_TV, inputs) - (trust_TV * log_q_TV).sum(-1)


def tropd_exact_top_k(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """As :func:`tropd_exact`, the outliers' forward KL on the teacher's top-k. [T]"""
    return tropd_exact(log_q_TV, log_p_TV, inputs, top_forward_kl)


def renormalised_forward_kl(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """The forward KL of the distributions renormalised on the teacher's top-k. [T]"""
    log_p_TK, ids_TK = log_p_TV.topk(TOP_K, dim=-1)
    log_q_TK = log_q_TV.gather(1, ids_TK).log_softmax(-1)
    return forward_kl(log_q_TK, log_p_TK.log_softmax(-1), inputs)


def cross_entropy(log_q_TV: Tensor, log_p_TV: Tensor, inputs: Inputs) -> Tensor:
    """``-log q(x)``. [T]"""
    return -log_q_TV.gather(1, inputs.ids_T[:, None]).squeeze(1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Inputs], Tensor]] = {
    definition.__name__: definition
    for definition in (
        policy_gradient,
        tropd,
        tropd_exact,
        tropd_exact_top_k,
        forward_kl,
        reverse_kl,
        jsd,
        renormalised_forward_kl,
        cross_entropy,
    )
}


def dense_logits_loss(inputs: Inputs, divergence: str) -> LogitsLoss:
    """The definition as autograd runs it, on logits gathered over the ranks."""
    definition = DIVERGENCES[divergence]

    def loss(student_Tv: Tensor, teacher_Tv: Tensor) -> Tensor:
        student_TV = gather_columns(student_Tv, inputs.group)
        teacher_TV = gather_columns(teacher_Tv, inputs.group)
        dtype = torch.promote_types(student_Tv.dtype, torch.float32)
        log_q_TV = student_TV.to(dtype).log_softmax(-1)
        log_p_TV = teacher_TV.to(dtype).log_softmax(-1)
        return definition(log_q_TV, log_p_TV, inputs).mean()

    return loss


def gather_columns(local_Tv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's columns, side by side; the gradient flows to this rank's own. [T, V]

    Each rank then computes the whole loss, so that nothing is missing from its own columns.
    """
    if group.size() == 1:
        return local_Tv
    parts = [torch.empty_like(local_Tv) for _ in range(group.size())]
    dist.all_gather(parts, local_Tv.detach().contiguous(), group=group)
    parts[group.rank()] = local_Tv
    return torch.cat(parts, dim=-1)


class SumGradient(torch.autograd.Function):
    """Identity whose backward sums over the ranks: each holds the part of its own columns."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The hidden states."""
        ctx.group = group
        return hidden_TH.view_as(hidden_TH)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None]:
        """1 all-reduce (SUM) of [T, H]."""
        dist.all_reduce(grad_TH, group=ctx.group)
        return grad_TH, None


def from_logits(inputs: Inputs, loss: LogitsLoss) -> Callable[[], Tensor]:
    """A row of a loss that takes logits: both matrix products first.

    Args:
        inputs: of the row.
        loss: of the logits of student and teacher.

    Returns:
        The row.

    Collectives: those of the loss, and in backward 1 all-reduce of [T, H] with several ranks.
    """

    def run() -> Tensor:
        hidden_TH = inputs.hidden_TH
        if inputs.group.size() > 1:
            hidden_TH = SumGradient.apply(hidden_TH, inputs.group)
        with torch.no_grad():
            teacher_Tv = inputs.teacher_hidden_TH @ inputs.teacher_weight_vH.t()
        return loss(hidden_TH @ inputs.weight_vH.t(), teacher_Tv)

    return run


# --- Our rows ------------------------------------------------------------------------------------

OURS: dict[str, tuple[str, str, str]] = {
    "sampled opd": ("policy_gradient", "opd", "K1 policy gradient of the sampled token"),
    "top-k tropd": ("tropd", "tropd", "TrOPD: drawn region, outliers' top-64 forward KL"),
    "exact tropd": ("tropd_exact", "tropd_exact_full", "exact TrOPD, outliers' whole forward KL"),
    "exact tropd k64": ("tropd_exact_top_k", "tropd_exact", "exact TrOPD, top-64 forward KL"),
    "exact reverse_kl": ("reverse_kl", "gkd_reverse_kl", "reverse KL, whole vocabulary"),
    "exact forward_kl": ("forward_kl", "gkd_forward_kl", "forward KL, whole vocabulary"),
    "exact jsd": ("jsd", "gkd_jsd", "JSD(1/2), whole vocabulary"),
}
"""Method -> its divergence, its preset, what it is."""
OURS_LARGE = ("exact tropd", "exact reverse_kl", "exact forward_kl", "exact jsd")
"""Methods of the targets."""
OURS_LOGITS = ("sampled opd", "top-k tropd", "exact tropd")
VARIANTS = (
    ("top-k tropd", "given top-k", "the teacher's top-64 is given: no teacher product"),
    ("exact tropd", "metrics", "with the metrics of every training run"),
)
"""Method, name and difference of further rows of entrance (b)."""


def our_cases() -> list[Case]:
    """Entrance (b), from hidden states, then entrance (a), from logits."""
    cases = [
        Case(f"ours hidden {method}", "ours", divergence, computes, large=method in OURS_LARGE)
        for method, (divergence, _, computes) in OURS.items()
    ]
    for method, variant, what in VARIANTS:
        divergence, _, computes = OURS[method]
        name = f"ours hidden {method}, {variant}"
        cases.append(Case(name, "ours", divergence, f"{computes}; {what}"))
    for method in OURS_LOGITS:
        divergence, _, computes = OURS[method]
        cases.append(Case(f"ours logits {method}", "ours", divergence, computes))
    return cases


def build_ours(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """One of our rows, the teacher's hidden states and output layer on the same ranks."""
    from megatron_tropd.config.loss import preset
    from megatron_tropd.losses import LossTargets, tropd_loss, tropd_loss_from_hidden

    _, entrance, rest = case.name.split(" ", 2)
    method, _, variant = rest.partition(", ")
    targets = LossTargets(
        ids_T=inputs.ids_T,
        is_teacher_T=torch.zeros_like(inputs.ids_T, dtype=torch.bool),
        uniforms_T=inputs.uniforms_T,
    )
    common: dict[str, Any] = {
        "config": preset(OURS[method][1]),
        "vocab_size": inputs.vocab,
        "group": our_group(inputs),
        "metrics": variant == "metrics",
    }
    if entrance == "logits":
        return from_logits(
            inputs,
            lambda student_Tv, teacher_Tv: tropd_loss(
                student_Tv, targets, logits_signal(teacher_Tv, inputs), **common
            ).loss_T.mean(),
        )
    signal = our_signal(inputs, given=variant == "given top-k")

    def run() -> Tensor:
        output = tropd_loss_from_hidden(*inputs.leaves, targets, signal, **common)
        return output.loss / inputs.tokens

    return run


def our_group(inputs: Inputs) -> dist.ProcessGroup | None:
    """The group as our losses take it: none for one rank."""
    return inputs.group if inputs.group.size() > 1 else None


def logits_signal(teacher_Tv: Tensor, inputs: Inputs) -> Any:
    """The teacher's logits for entrance (a)."""
    from megatron_tropd.losses import LogitsSignal

    return LogitsSignal(teacher_Tv, vocab_size=inputs.vocab)


def our_signal(inputs: Inputs, *, given: bool) -> Any:
    """The teacher for entrance (b): its hidden states, or its top-k as a server sends it."""
    from megatron_tropd.losses import HiddenStatesSignal, top_k_signal

    teacher = inputs.teacher_hidden_TH, inputs.teacher_weight_vH
    if not given:
        return HiddenStatesSignal(*teacher, vocab_size=inputs.vocab)
    logits_Tv = teacher[0] @ teacher[1].t()
    shard = {"vocab_size": inputs.vocab, "group": our_group(inputs)}
    return top_k_signal(logits_Tv, inputs.ids_T, TOP_K, **shard)


# --- The table of rows ---------------------------------------------------------------------------

PRODUCTS = "matrix products"


def all_cases() -> list[Case]:
    """Every row, in the order of the table."""
    from loss_peers import peer_cases

    only = "student and teacher logits, both gradients, nothing else"
    bare = Case(PRODUCTS, "dense", "", only, large=True)
    dense = [
        Case("dense reverse_kl", "dense", "reverse_kl", "float32 autograd on whole logits"),
        Case("dense jsd", "dense", "jsd", "float32 autograd on whole logits", sharded=False),
        Case("dense tropd", "dense", "tropd_exact", "exact TrOPD, float32 autograd", sharded=False),
    ]
    return [bare, *our_cases(), *dense, *peer_cases()]


def build(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """The row, ready to be called.

    Args:
        case: which.
        inputs: on which.

    Returns:
        A function that makes the mean loss.
    """
    if case.source == "ours":
        return build_ours(case, inputs)
    if case.source == "dense":
        return from_logits(inputs, dense_logits_loss(inputs, case.divergence))
    from loss_peers import build_peer

    return build_peer(case, inputs)
