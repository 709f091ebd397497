"""Every loss against the float64 reference, value and gradient, at TP 1, 2 and 4 on gloo.

A *problem* is a pair of models at T positions, a *case* a problem with a loss and the reference's
answer. Every case runs through both entrances and all signals that serve it. One spawn of four
ranks serves TP 4 (all of them) and TP 2 (two pairs); TP 1 needs none. Not exercised here: NCCL,
and the sum over micro-batches, which belongs to the training step.
"""

import contextlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from loss_settings import FLAT, config_of
from reference import Answer, Tokens

from megatron_tropd.config.loss_of_0_1 import DEFAULTS
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    TopKSignal,
    align_logits,
    align_output_weight,
    chunks,
    dense,
    equal_bounds,
    required_signal,
    tensors,
    token_statistics,
    top_k_signal,
    tropd_loss,
    tropd_loss_from_hidden,
)
from megatron_tropd.losses.passes import StatelessPasses
from tests.ranks import run_on_ranks

BETA = 0.3
TAU = -0.4
HIDDEN = 8
ALWAYS = {
    *("loss", "term", "student_logprob", "teacher_logprob", "trust", "outlier", "k1"),
    *("importance", "dropped"),
}
BOUNDS = {
    (507, "teacher", 4): [0, 100, 230, 230, 507],
    (507, "student", 4): [0, 60, 60, 200, 507],
    (507, "student", 2): [0, 120, 507],
    (8, "student", 4): [0, 5, 5, 6, 8],
    (8, "student", 2): [0, 0, 8],
}
"""(columns, model, ranks) -> bounds of the shards; some have no column at all."""
DIVERGENCES = {"tv", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"}
MASSES = {"topk_mass_teacher", "topk_mass_student"}


# ---- the losses ----


def _all_settings() -> dict[str, dict]:
    """Name -> settings: every term, region, outlier and option."""
    clip = dict(outlier="clip", tau=TAU)
    outliers = {
        "forward_kl": dict(),
        "full": dict(top_k=0),
        "mask": dict(outlier="mask"),
        "clip": clip,
    }
    found = {}
    for region in ("bernoulli", "expected", "exact", "threshold"):
        for name, outlier in outliers.items():
            found[f"{region}-{name}"] = dict(region=region, tau=TAU) | outlier
    found["threshold-floor"] = dict(region="threshold", floor=0.7)
    found["clip-other-floor"] = dict(outlier="clip", floor=0.4, floor_rule="log(l/(1-l))")

    eopd = dict(region="none", entropy_forward_kl=2.4)
    plain = {
        "opd": dict(region="none"),
        "opd-clip-ignored": dict(region="none") | clip,
        "proximal": dict(region="none", reward="proximal", proximal_alpha=0.2),
        "eopd": eopd,
    }
    score = {
        f"score-{name}": found[name] | dict(gradient="score_function")
        for name in (
            *("bernoulli-forward_kl", "bernoulli-full", "bernoulli-mask", "bernoulli-clip"),
            "threshold-forward_kl",
        )
    }
    score["score-opd"] = dict(region="none", gradient="score_function")
    found |= plain | score

    found |= {
        "opsa": dict(method="opsa", advantage=-0.7),
        **{
            f"veto {name} {b}": dict(method="veto", divergence=name, student_power=b)
            for name, b in (("forward_kl", 0.3), ("reverse_kl", 0.3), ("reverse_kl", 1.0))
        },
        **{f"power={a}": dict(method="power_opd", power=a) for a in (0.5, 5.0)},
        **{f"exact power={a}": dict(method="power_opd_exact", power=a) for a in (0.5, 5.0)},
    }
    stale = ("bernoulli-forward_kl", "bernoulli-clip", "expected-forward_kl", "expected-clip")
    stale += ("expected-mask", "threshold-mask", "opd", "proximal", "eopd")
    stale += ("score-bernoulli-forward_kl", "power=5.0")
    for importance in ("truncated", "band", "ppo"):
        for name in stale:
            found[f"{name}-{importance}"] = found[name] | dict(
                importance=importance, importance_low=0.75, importance_high=1.25
            )
    for objective in ("forward_kl", "reverse_kl", "jsd", "local_support"):
        for writer in ("nll", "same"):
            found[f"{objective}-{writer}"] = dict(
                objective=objective, teacher_tokens=writer, jsd_beta=0.3
            )
    # Not renormalised: a student's top-k that the teacher never writes cannot be.
    for support, writer in (("student", "nll"), ("student", "same"), ("teacher", "same")):
        found[f"trb-{support}-{writer}"] = dict(
            method="trb", support=support, teacher_tokens=writer
        )
    return {name: dict(top_k=4) | settings for name, settings in found.items()}


SETTINGS = _all_settings()
FEW = ("bernoulli-forward_kl", "exact-full", "exact-clip", "eopd-ppo", "jsd-same")
FEW += ("local_support-nll", "reverse_kl-same", "opd", "trb-student-nll")
FEW += ("exact power=5.0", "veto forward_kl 0.3")


def _presets() -> dict[str, dict]:
    """Every published method as it is, and the second phase of the one that has two."""
    found = {f"preset {name}": dict(settings) for name, settings in FLAT.items()}
    found["preset reopold, second phase"] = FLAT["reopold"] | {"outlier": "clip"}
    return found


# ---- the problems ----


@dataclass
class Problem:
    """A pair of models at T positions; logits [T, width], or hidden @ weight^T."""

    vocab_size: int
    student: torch.Tensor
    teacher: torch.Tensor
    tokens: Tokens
    products: tuple[torch.Tensor, ...] | None = None
    """(student hidden states, output layer, the teacher's two), where both logits are products."""
    uneven: bool = False
    """Shards by bounds: :data:`BOUNDS`, or of widths that differ by one."""
    masses: dict = field(default_factory=dict)
    """Those of the teacher's top-k, by k; filled on demand."""
    error: torch.Tensor | None = None
    """[T] what float32 may get wrong; filled on demand."""

    def real(self, name: str) -> torch.Tensor:
        """Logits without padding."""
        return getattr(self, name)[:, : self.vocab_size]


def _grid(draw, *shape, scale=1.0):
    """Normal numbers rounded to multiples of 1/64: exact in bfloat16, and so are their products
    in float32, in whatever order they are summed.
    """
    numbers = torch.randn(*shape, generator=draw) * scale
    return (numbers.clamp(-2, 2) * 64).round() / 64


def _products(tokens, vocab_size, widths, *, dtype=torch.float32, seed=0, uneven=False):
    """Hidden states and output layers; some rows have huge logits, padding has nan or 60."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = _grid(draw, tokens, HIDDEN), _grid(draw, vocab_size, HIDDEN, scale=0.7)
    near = (hidden + _grid(draw, tokens, HIDDEN, scale=0.5)).clamp(-2, 2)
    close = (weight + _grid(draw, vocab_size, HIDDEN, scale=0.25)).clamp(-2, 2)
    hidden[5::11] *= 2**11  # logits around 1e4: q underflows nearly everywhere
    near[8::11] *= 2**10  # p does
    layers = []
    for rows, width, padding in ((weight, widths[0], math.nan), (close, widths[1], 60.0)):
        layer = torch.full((width, HIDDEN), padding)
        layer[:vocab_size] = rows
        layers.append(layer.to(dtype))
    hidden, near = hidden.to(dtype), near.to(dtype)
    problem = Problem(
        vocab_size,
        hidden @ layers[0].t(),
        near @ layers[1].t(),
        tokens=_tokens(draw, tokens, vocab_size),
        products=(hidden, layers[0], near, layers[1]),
        uneven=uneven,
    )
    return _with_draws(problem, draw)


def _tokens(draw, num, vocab_size):
    return Tokens(
        torch.randint(vocab_size, (num,), generator=draw),
        torch.rand(num, generator=draw) < 0.3,
        torch.rand(num, generator=draw),
        torch.rand(num, generator=draw) + 0.5,
    )


def _with_draws(problem, draw):
    """Tokens that reach every branch, none so close to its threshold that rounding decides."""
    tokens, num = problem.tokens, len(problem.tokens.ids)
    if not num:
        return replace(problem, tokens=replace(tokens, rollout_logprobs=torch.zeros(0)))
    likely = problem.real("student").double().softmax(-1).multinomial(1, generator=draw)
    tokens.ids[::3] = likely.squeeze(-1)[::3]
    return replace(problem, tokens=_fitting(problem, draw))


def _fitting(problem, draw):
    """The tokens with draws clear of the trust and importance ratios clear of their limits."""
    tokens = problem.tokens
    student, teacher = problem.real("student").double(), problem.real("teacher").double()
    models = reference.Models(student, teacher, tokens.ids, 1)
    close = (tokens.uniforms - models.trust_x).abs() < 0.02
    # Away from the trust, towards the farther end of [0, 1).
    clear = torch.where(models.trust_x > 0.5, models.trust_x - 0.3, models.trust_x + 0.3)
    uniforms = torch.where(close, clear, tokens.uniforms.double()).float()
    rho = torch.tensor([0.2, 0.6, 0.9, 1.0, 1.1, 1.5, 3.0], dtype=torch.float64)
    chosen = rho[torch.randint(len(rho), (len(tokens.ids),), generator=draw)]
    # A reward of 0 has no sign that says which side is clipped.
    chosen = torch.where(models.ratio_x.abs() < 1e-3, 1.0, chosen)
    log_q = models.at(models.lq).clamp(min=-50_000)
    rollout = torch.where(tokens.is_teacher, math.nan, log_q - chosen.log())  # not read there
    return replace(tokens, uniforms=uniforms, rollout_logprobs=rollout.float())


def _edges(dtype=torch.float32, seed=1):
    """Three rows of every kind of trouble: trusted, outlier, written by the teacher."""
    vocab_size, widths = 37, (40, 44)
    draw = torch.Generator().manual_seed(seed)
    students, teachers, ids, far = [], [], [], -math.inf

    def add(change, x=None):
        for _ in range(3):
            q = 1.5 * torch.randn(vocab_size, generator=draw)
            p = 0.5 * q + 1.2 * torch.randn(vocab_size, generator=draw)
            row = SimpleNamespace(q=q, p=p, x=int(torch.randint(vocab_size, (1,), generator=draw)))
            row.x = row.x if x is None else x
            change(row)
            students.append(row.q), teachers.append(row.p), ids.append(row.x)

    def assign(name, columns, value, *, plus=False):
        def change(row):
            logits = getattr(row, name)
            logits[columns] = value + logits[columns] * plus

        return change

    def both(*changes):
        return lambda row: [change(row) for change in changes]

    def excluded_by(*names):
        return lambda row: [getattr(row, name).__setitem__(row.x, far) for name in names]

    def unlikely_excluded(row):
        row.q[row.p.argmin()] = far

    def equal(row):
        row.p = row.q.clone()

    def tied(row):
        row.q, row.p = row.q.round(), row.p.round()
        row.p[::3] *= -1.0  # zeros of both signs, equal as numbers

    def sharp(row):
        row.p = torch.full_like(row.p, -200.0)
        row.p[11] = 0.0

    def sharp_student(row):
        row.q = torch.full_like(row.q, -200.0)
        row.q[12] = 0.0

    odd, even, few = slice(1, 30, 2), slice(0, None, 2), slice(2, None)
    add(lambda row: None)
    add(assign("p", odd, far), x=4)
    add(assign("p", slice(20, 30), far), x=31)  # all columns of the third of four ranks
    add(assign("p", few, far), x=1)  # fewer than the top-k
    add(excluded_by("p"))
    add(excluded_by("q"), x=7)
    add(excluded_by("p", "q"))
    add(both(assign("p", odd, far), assign("q", slice(1, 30, 4), far)), x=6)
    add(unlikely_excluded, x=2)
    add(assign("q", even, 1e4, plus=True), x=8)
    add(assign("q", even, 1e4, plus=True), x=9)
    add(assign("p", even, 1e4, plus=True), x=9)
    add(both(assign("q", slice(None), 1e4, plus=True), assign("p", slice(None), -1e4, plus=True)))
    add(lambda row: row.q.mul_(5e3))
    add(equal)
    add(tied)
    add(tied)
    add(sharp, x=11)
    add(sharp)
    add(sharp_student, x=12)
    add(both(sharp, sharp_student), x=12)

    return _padded(vocab_size, widths, students, teachers, ids, dtype, draw)


def _padded(vocab_size, widths, students, teachers, ids, dtype, draw) -> Problem:
    """Rows as a problem, each model with padding of its own; trusted, outlier, teacher in turn."""
    num, padded = len(ids), []
    for rows, width, padding in ((students, widths[0], math.nan), (teachers, widths[1], 60.0)):
        logits = torch.full((num, width), padding)
        logits[:, :vocab_size] = torch.stack(rows)
        padded.append(logits.to(dtype))
    third = torch.arange(num) % 3
    tokens = Tokens(
        torch.tensor(ids), third == 2, third * 0.97 + 0.01, torch.rand(num, generator=draw) + 0.5
    )
    problem = Problem(vocab_size, *padded, tokens=tokens)
    problem.tokens = _fitting(problem, draw)
    return problem


def _problems() -> dict[str, Problem]:
    bf16 = torch.bfloat16
    # The widths of student and teacher differ, so equal shards hold other columns.
    found = {
        "fp32": _products(24, 37, (40, 44)),
        "bf16": _products(24, 37, (40, 44), dtype=bf16, seed=2),
        "edges": _edges(),
        "edges, bf16": _edges(bf16, seed=3),
        "507 columns": _products(12, 507, (507, 507), seed=4, uneven=True),
        "a rank of padding only": _products(8, 5, (8, 8), seed=5),
        "no padding": _products(8, 8, (8, 8), seed=6),
        "a rank without columns": _products(8, 8, (8, 8), seed=7, uneven=True),
        "one token": _products(1, 37, (44, 40), seed=8),
        "no tokens": _products(0, 37, (40, 44)),
    }
    tokens = found["fp32"].tokens
    ones = torch.ones_like(tokens.is_teacher)
    for name, other in {
        "all masked": dict(weights=0.0 * ones),
        "weight 1": dict(weights=None),
        "all teacher": dict(is_teacher=ones, rollout_logprobs=tokens.rollout_logprobs * math.nan),
        "rewards of the caller": dict(rewards=torch.linspace(-2.1, 2.2, 24)),
    }.items():
        found[name] = replace(found["fp32"], tokens=replace(tokens, **other))
    student = replace(tokens, is_teacher=~ones)
    draw = torch.Generator().manual_seed(9)
    found["all student"] = replace(found["fp32"], tokens=student)
    found["all student"].tokens = _fitting(found["all student"], draw)
    return found


@dataclass
class Case:
    """A problem with a loss and what should come out."""

    name: str
    problem: str
    settings: dict
    tokens: Tokens
    """Those of the problem, without weight where the truth is infinite."""
    answer: Answer

    @cached_property
    def config(self):
        """The loss, as it is given to the code."""
        return config_of(**self.settings)


def _cases(problems: dict[str, Problem]) -> list[Case]:
    sizes = {f"k={k} {o}": {"objective": o, "top_k": k, "region": "expected"} for k in (1, 5)
             for o in ("policy_gradient", "local_support")}  # fmt: skip
    few = {name: SETTINGS[name] for name in FEW}
    given = {name: SETTINGS[name] for name in ("opd", "opd-ppo", "bernoulli-clip", "expected-mask")}
    wanted = {
        "507 columns": _presets() | few,
        "a rank of padding only": few | sizes,
        "rewards of the caller": given,
        "edges, bf16": dict(list(SETTINGS.items())[::4]),
    }
    cases = []
    for where, problem in problems.items():
        everything = where in ("fp32", "bf16", "edges")
        for name, settings in wanted.get(where, SETTINGS if everything else few).items():
            cases.append(_case(f"{name} on {where}", where, problem, settings))
    return cases


def _case(name, where, problem, settings):
    tokens = problem.tokens
    for _ in range(2):
        found = reference.answer(
            problem.real("student"), problem.real("teacher"), tokens, settings, beta=BETA
        )
        infinite = ~found.values["term"].isfinite() | ~found.gradient_TV.isfinite().all(-1)
        if not infinite.any():
            break
        weights = torch.ones(len(tokens.ids)) if tokens.weights is None else tokens.weights
        tokens = replace(tokens, weights=torch.where(infinite, 0.0, weights))
    assert found.gradient_TV.isfinite().all()
    return Case(name, where, settings, tokens, found)


@pytest.fixture(scope="module")
def problems():
    return _problems()


@pytest.fixture(scope="module")
def cases(problems):
    return _cases(problems)


# ---- running the code ----


class Place:
    """A rank of a tensor-parallel group, and what it holds."""

    def __init__(self, group):
        self.group = group
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())

    def bounds(self, problem, model):
        """Column ids of the shards of "student" or "teacher"."""
        width = getattr(problem, model).shape[1]
        if not problem.uneven:
            return [width * rank // self.size for rank in range(self.size + 1)]
        return BOUNDS.get((width, model, self.size)) or equal_bounds(width, self.size)

    def columns(self, problem, model):
        bounds = self.bounds(problem, model)
        return slice(bounds[self.rank], bounds[self.rank + 1])


def _signal(kind, problem, case, place, *, aligned):
    """The teacher as a signal; ``aligned``: at the student's columns."""
    have, want = place.bounds(problem, "teacher"), place.bounds(problem, "student")
    mine, vocab_size = place.columns(problem, "teacher"), problem.vocab_size
    move = dict(have=have, want=want, group=place.group)
    bounds = want if aligned else have
    bounds = tuple(bounds) if problem.uneven else None
    if kind == "hidden":
        _hidden, _weight, hidden, weight = problem.products
        rows = weight[mine].clone()
        return HiddenStatesSignal(
            hidden, align_output_weight(rows, **move) if aligned else rows, vocab_size, bounds
        )
    logits = problem.teacher[:, mine].clone()
    if kind == "logits":
        logits = align_logits(logits, **move) if aligned else logits
        return LogitsSignal(logits, vocab_size, bounds)
    # A signal may bring more than the loss uses.
    k = min(case.config.needs.top_k + 2, vocab_size)
    if kind == "top_k of the shards":
        return top_k_signal(
            logits, case.tokens.ids, k, vocab_size=vocab_size, group=place.group, bounds=have
        )
    logprobs = problem.real("teacher").double().log_softmax(-1)
    ids = reference.top_k_ids(problem.real("teacher").double(), k)
    sampled = logprobs.gather(-1, case.tokens.ids.unsqueeze(-1)).squeeze(-1)
    return TopKSignal(sampled.float(), ids, logprobs.gather(-1, ids).float())


def _targets(tokens):
    return LossTargets(*(None if v is None else v.clone() for v in vars(tokens).values()))


@contextlib.contextmanager
def _unchanged(*objects):
    """The caller's tensors keep every bit."""
    tensors = [v for o in objects for v in ([o] if torch.is_tensor(o) else vars(o).values())]
    tensors = [tensor for tensor in tensors if torch.is_tensor(tensor)]
    copies = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())


@contextlib.contextmanager
def _way_to_compute(*, rows=None, budget=None, plain=False, overlap=False):
    """Chunks of so many rows, or of what so many bytes hold; the passes of other devices; two
    chunks under way as on a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if rows:
            patch.setattr(chunks, "_chunk_rows", lambda *args: rows)
        if budget:
            patch.setattr(chunks, "_budget", lambda pair: budget)
        if overlap:
            patch.setattr(chunks, "overlaps", lambda pair: True)
        if plain:
            patch.setenv("TROPD_PLAIN", "1")
            patch.setattr(chunks, "gradient_dtype", _gradient_dtype_of_a_gpu)
            patch.setattr(chunks, "passes_for", partial(RoundedOnce, dense))
        yield


def _gradient_dtype_of_a_gpu(pair):
    of_hidden = getattr(pair.student, "hidden_TH", None)
    return torch.bfloat16 if of_hidden is not None and of_hidden.dtype == torch.bfloat16 else None


class RoundedOnce(StatelessPasses):
    """Plain torch, writing gradients in lower precision as the kernels of a GPU do."""

    def write_gradient(self, student_norm, teacher_norm, coefficients, out):
        exact = torch.empty(out.shape, dtype=torch.float32)
        super().write_gradient(student_norm, teacher_norm, coefficients, exact)
        out.copy_(exact)


def _options(problem, case, place, metrics):
    bounds = place.bounds(problem, "student") if problem.uneven else None
    return dict(
        config=case.config,
        vocab_size=problem.vocab_size,
        group=place.group,
        bounds=bounds,
        beta=BETA,
        metrics=metrics,
    )


def _check_logits(case, problem, kind, place, *, metrics=True):
    """Entrance (a); returns what has to be the same on all ranks."""
    mine = place.columns(problem, "student")
    leaf = problem.student[:, mine].clone().requires_grad_()
    signal = _signal(kind, problem, case, place, aligned=kind == "hidden")
    targets = _targets(case.tokens)
    with _unchanged(leaf, signal, targets):
        output = tropd_loss(leaf, targets, signal, **_options(problem, case, place, metrics))
        factor = torch.arange(1.0, len(output.loss_T) + 1)  # shows mixed-up rows
        (output.loss_T * factor).sum().backward()
    assert output.loss_T.dtype == torch.float32 and output.loss_T.requires_grad
    torch.testing.assert_close(output.loss_T.detach(), output.values["loss"], rtol=0, atol=0)
    _check_values(case, problem, kind, output.values, metrics)

    assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
    expected = torch.zeros_like(problem.student, dtype=torch.float64)
    expected[:, : problem.vocab_size] = factor.unsqueeze(-1) * case.answer.gradient_TV
    rounding = 2**-8 if leaf.dtype == torch.bfloat16 else 0.0
    allowed = rounding * expected.abs() + factor.unsqueeze(-1) * _row_error(case, problem)
    _near("gradient of the logits", leaf.grad, expected[:, mine], allowed[:, mine])
    real = max(0, min(problem.vocab_size - mine.start, leaf.shape[1]))
    assert torch.all(leaf.grad[:, real:] == 0), "padded columns got a gradient"
    assert torch.all(leaf.grad[output.values["dropped"] == 1] == 0), "dropped, yet it has one"
    return [*output.values.values()]


def _check_hidden(case, problem, kind, place, *, metrics=True, sp=False, reduce=True, main=False):
    """Entrance (b); returns what has to be the same on all ranks."""
    rows = slice(None)
    if sp:
        each = problem.student.shape[0] // place.size
        rows = slice(each * place.rank, each * (place.rank + 1))
    mine = place.columns(problem, "student")
    hidden = problem.products[0][rows].clone().requires_grad_()
    weight = problem.products[1][mine].clone().requires_grad_()
    buffer = torch.full(weight.shape, 0.5) if main else None
    signal = _signal(kind, problem, case, place, aligned=True)
    targets = _targets(case.tokens)
    with _unchanged(hidden, weight, signal, targets):
        output = tropd_loss_from_hidden(
            hidden,
            weight,
            targets,
            signal,
            **_options(problem, case, place, metrics),
            sequence_parallel=sp,
            reduce_hidden_grad=reduce,
            main_grad=buffer,
        )
        if main:
            assert torch.all(buffer == 0.5), "added before backward"
        (output.loss * 3.0).backward()
    _check_values(case, problem, kind, output.values, metrics)
    assert output.loss.dtype == torch.float32 and output.loss.shape == ()
    total = output.values["loss"].double().sum()
    torch.testing.assert_close(output.loss.detach().double(), total, rtol=1e-5, atol=1e-5)

    grad = hidden.grad
    assert grad.dtype == hidden.dtype and grad.shape == hidden.shape
    if not reduce and place.group is not None:
        grad = grad.double()
        dist.all_reduce(grad, group=place.group)
    _check_hidden_gradients(case, problem, grad, rows, weight, mine, buffer)
    same = [*output.values.values(), output.loss.detach().expand(len(case.tokens.ids))]
    return same if sp or not reduce else [*same, *grad.float().unbind(-1)]


def _check_hidden_gradients(case, problem, grad, rows, weight, mine, buffer):
    """The float64 chain rule from the reference's gradient of the logits."""
    vocab_size = problem.vocab_size
    logits_grad = 3.0 * case.answer.gradient_TV
    row_error = 3.0 * _row_error(case, problem)
    hidden64 = problem.products[0].double()
    weight64 = problem.products[1][:vocab_size].double()
    bf16 = 2**-6 if weight.dtype == torch.bfloat16 else 0.0
    expected = logits_grad @ weight64
    allowed = bf16 * (logits_grad.abs() @ weight64.abs()) + row_error * weight64.abs().sum(0)
    _near("gradient of the hidden states", grad, expected[rows], allowed[rows])

    width = problem.student.shape[1]
    expected, allowed = torch.zeros(2, width, HIDDEN, dtype=torch.float64)
    expected[:vocab_size] = logits_grad.t() @ hidden64
    allowed[:vocab_size] = (row_error * hidden64.abs()).sum(0)
    found = weight.grad
    if buffer is not None:
        # Added to what is there, unrounded; its factors may be rounded.
        assert weight.grad is None
        found = buffer - 0.5
        allowed = allowed + 1e-6 * (1 + expected.abs())
        if bf16 and chunks.gradient_dtype is _gradient_dtype_of_a_gpu:
            allowed[:vocab_size] += 2**-8 * (logits_grad.abs().t() @ hidden64.abs())
        bf16 = 0.0
    assert found.dtype == (torch.float32 if buffer is not None else weight.dtype)
    allowed = allowed + bf16 * expected.abs()
    _near("gradient of the output layer", found, expected[mine], allowed[mine])
    real = max(0, min(vocab_size - mine.start, found.shape[0]))
    assert torch.all(found[real:] == 0), "padded rows got a gradient"


def _row_error(case, problem):
    """[T, 1] what float32 may get wrong: a log-prob of size 1e4 is known to 1e-3."""
    size = case.answer.gradient_TV.abs().amax(-1, keepdim=True).nan_to_num()
    weights = 1.0 if case.tokens.weights is None else case.tokens.weights.double().unsqueeze(-1)
    loss = case.answer.values["loss"].abs().unsqueeze(-1)
    return _relative_error(problem).unsqueeze(-1) * (size + loss + 0.1 * weights)


def _relative_error(problem):
    if problem.error is None:
        problem.error = _error_of_float32(problem)
    return problem.error


def _error_of_float32(problem):
    logits = torch.cat([problem.real("student"), problem.real("teacher")], dim=-1).double()
    finite = torch.where(logits.isfinite(), logits.abs(), 0.0)
    return 1e-5 + 2e-7 * finite.amax(-1) if finite.numel() else finite.sum(-1)


def _near(what, actual, expected, allowed):
    actual, allowed = actual.double(), torch.as_tensor(allowed).expand(expected.shape)
    assert actual.shape == expected.shape, what
    same = actual == expected  # infinities
    wrong = ~(same | ((actual - expected).abs() <= allowed))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        name = what[at[0]] if isinstance(what, list) else what
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
            f"found {float(actual[at])}, expected {float(expected[at])} "
            f"within {float(allowed[at])}"
        )


def _check_values(case, problem, kind, values, metrics):
    config, found = case.config, set(values)
    full = "top_k" not in kind
    required = ALWAYS | (DIVERGENCES if full and metrics else set())
    required |= MASSES if config.needs.top_k else set()
    assert required <= found <= ALWAYS | (DIVERGENCES if full else set()) | MASSES
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in values.values())
    # A loss without a top-k reports the mass of 64, or of what the signal brings.
    k = config.needs.top_k or min(64 if full else 2, problem.vocab_size)
    needs = config.needs
    known = case.answer.values | _masses(problem, k, needs.student_top_k, needs.target.student)
    expected = torch.stack([known[name] for name in values])
    weights = torch.ones(expected.shape, dtype=torch.float64)
    if case.tokens.weights is not None:
        weights[list(values).index("loss")] = case.tokens.weights
    allowed = _relative_error(problem) * (expected.abs().nan_to_num(posinf=0.0) + weights)
    _near(list(values), torch.stack(list(values.values())), expected, allowed)


def _masses(problem, k, by_student, power):
    """Of the teacher's or student's top-k, or of the product's that stands in its place."""
    key = k, by_student, power
    if key not in problem.masses:
        student, teacher = problem.real("student").double(), problem.real("teacher").double()
        teacher = reference.product(teacher, student, power) if power else teacher
        problem.masses[key] = reference.top_k_masses(student, teacher, k, by_student=by_student)
    return problem.masses[key]


# ---- every case ----


def _signals(case, problem):
    kinds = ["logits"] if problem.products is None else ["logits", "hidden"]
    if "full" not in required_signal(case.config):
        kinds += ["top_k", "top_k of the shards"]
    return kinds


def _runs(cases, problems, place, *, thorough):
    """(case, call) of everything to be checked in one place.

    ``thorough``: all signals through both entrances; otherwise each entrance once, the signals in
    turn. Options that change nothing but the way are taken in turn as well.
    """
    turn = cycle(range(60))
    for case in cases:
        problem = problems[case.problem]
        kinds, every = _signals(case, problem), thorough(case)
        for kind in kinds if every else [kinds[next(turn) % len(kinds)]]:
            yield case, _check_logits, kind, dict(metrics=next(turn) % 3 > 0)
        if problem.products is None:
            continue
        divides = len(case.tokens.ids) % place.size == 0
        for kind in kinds if every else [kinds[next(turn) % len(kinds)]]:
            number = next(turn)
            options = dict(metrics=number % 3 > 0, main=number % 2 > 0)
            options |= dict(reduce=number % 5 > 0)
            yield case, _check_hidden, kind, options
        if divides and place.group is not None:
            kind, number = kinds[next(turn) % len(kinds)], next(turn)
            yield case, _check_hidden, kind, dict(sp=True, main=number % 2 > 0)


def _check_everything(cases, problems, place, *, thorough):
    """All runs, in turn with other chunks and other implementations, which may change nothing."""
    runs = _runs(cases, problems, place, thorough=thorough)
    for number, (case, check, kind, options) in enumerate(runs):
        # Bytes, not rows: how many rows these hold is for the ranks to agree on, whatever columns
        # each of them has. Two or three chunks.
        bytes_of_column = (None, 200, None, 290)[number % 4]
        width = problems[case.problem].student.shape[1]
        way = dict(
            budget=bytes_of_column and bytes_of_column * width // place.size,
            plain=number % 3 == 2,
            overlap=number % 5 > 2,
        )
        try:
            with _way_to_compute(**way):
                same = check(case, problems[case.problem], kind, place, **options)
            if place.group is not None:
                _check_same_on_ranks(same, place.group)
        except Exception as error:
            raise AssertionError(
                f"{case.name}: {check.__name__} with signal {kind}, {options}, {way}, "
                f"TP {place.size}: {case.settings}"
            ) from error


def _check_same_on_ranks(columns, group):
    """Bit for bit: ranks that disagree on a mask would train different models."""
    mine = torch.stack(columns)
    others = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(others, mine, group=group)
    assert all(torch.equal(mine.view(torch.int32), other.view(torch.int32)) for other in others)


def test_losses_tp1(cases, problems):
    _check_everything(cases, problems, Place(None), thorough=lambda case: case.problem == "fp32")


def test_losses_tp2_and_tp4(cases, problems, tmp_path):
    torch.save((cases, problems), tmp_path / "cases.pt")
    run_on_ranks(4, _check_on_ranks, str(tmp_path / "cases.pt"))


def _check_on_ranks(world, path):
    cases, problems = torch.load(path, weights_only=False)
    alone = [dist.new_group([rank]) for rank in range(4)][world.rank()]
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank() // 2]
    everywhere = [Place(alone), Place(pair), Place(world)]
    by_name = {case.name: case for case in cases}
    few = [by_name[f"{name} on fp32"] for name in FEW]
    _check_everything(few[:2], problems, Place(alone), thorough=lambda case: False)
    # The pairs share the work.
    _check_everything(
        cases[world.rank() // 2 :: 2], problems, Place(pair), thorough=lambda case: False
    )
    _check_everything(cases, problems, Place(world), thorough=lambda case: False)
    for place in everywhere:
        _check_top_k(problems["edges"], place)
        _check_statistics(few[0], problems["fp32"], place)
        _check_ids_of_no_rank(problems["fp32"], place)
    for case in few:
        _check_collectives(case, problems["fp32"], Place(world))
    _check_refusals(few[0], problems["fp32"], Place(world))
    _check_not_a_number(few[0], problems["fp32"], Place(world))


# ---- on several ranks only ----


def _check_top_k(problem, place):
    """The global top-k with ties to the lower id, however the columns lie."""
    mine, vocab_size = place.columns(problem, "teacher"), problem.vocab_size
    teacher = problem.real("teacher").double()
    for k in (1, 4, vocab_size):
        found = top_k_signal(
            problem.teacher[:, mine], problem.tokens.ids, k, vocab_size=vocab_size,
            group=place.group,
        )  # fmt: skip
        expected = reference.top_k_ids(teacher, k)
        assert torch.equal(found.topk_ids_TK, expected)
        logprobs = teacher.log_softmax(-1)
        for actual, ids in (
            (found.topk_logprobs_TK, expected),
            (found.sampled_logprobs_T.unsqueeze(-1), problem.tokens.ids.unsqueeze(-1)),
        ):
            error = _relative_error(problem).unsqueeze(-1)
            _near("log-probs", actual, logprobs.gather(-1, ids), error)


def _check_statistics(case, problem, place):
    """Scoring sees what the loss sees, and has no gradient."""
    hidden, weight = problem.products[0].clone(), problem.products[1].clone()
    mine = place.columns(problem, "student")
    options = _options(problem, case, place, metrics=True)
    del options["beta"], options["metrics"]
    columns = options.pop("vocab_size"), options.pop("bounds", None)
    signal = _signal("logits", problem, case, place, aligned=True)
    targets = _targets(case.tokens)
    leaf = problem.student[:, mine].clone().requires_grad_()
    for found in (
        token_statistics(student, targets, signal, **options)
        for student in (
            LogitsSignal(leaf, *columns),
            HiddenStatesSignal(hidden.requires_grad_(), weight[mine].requires_grad_(), *columns),
        )
    ):
        values = dict(
            student_logprob=found.student_logprob_T,
            teacher_logprob=found.teacher_logprob_T,
            **found.divergences(),
        )
        assert values.keys() >= DIVERGENCES
        for name, column in values.items():
            assert not column.requires_grad
            expected = case.answer.values[name]
            _near(name, column, expected, _relative_error(problem) * (expected.abs() + 1))


COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("reduce_scatter", "all_to_all_single", "all_to_all", "broadcast", "reduce", "gather"),
    *("scatter", "barrier", "all_gather_object", "broadcast_object_list", "send", "recv"),
    *("isend", "irecv", "batch_isend_irecv", "all_gather_single", "reduce_scatter_single"),
)


@contextlib.contextmanager
def _counted():
    """The collectives of torch.distributed, each as (name, bytes of its largest tensor)."""
    calls = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name, original):
        def call(*args, **kwargs):
            given = [*args, *kwargs.values()]
            given += [part for value in given if isinstance(value, list) for part in value]
            sizes = [v.numel() * v.element_size() for v in given if torch.is_tensor(v)]
            calls.append((name, max(sizes, default=0)))
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _check_collectives(case, problem, place):
    """Two small ones per chunk forward; backward the sum of the hidden gradient, if asked for."""
    num, per_chunk, mine = len(case.tokens.ids), 5, place.columns(problem, "student")
    num_chunks = math.ceil(num / per_chunk)
    k = case.config.needs.top_k or problem.vocab_size  # below the 64 of the metrics
    small = per_chunk * (k + 8) * 12 * place.size  # 12: an int64 and a float32 per candidate
    kinds = [kind for kind in _signals(case, problem) if kind != "top_k of the shards"]
    for kind, plain in product(kinds, (False, True)):
        way = dict(rows=per_chunk, plain=plain)
        signal, targets = _signal(kind, problem, case, place, aligned=True), _targets(case.tokens)
        if kind == "logits":  # the student's columns, so that nothing has to be moved
            signal = replace(signal, bounds=tuple(place.bounds(problem, "student")))
        options = _options(problem, case, place, metrics=True)
        leaf = problem.student[:, mine].clone().requires_grad_()
        with _way_to_compute(**way), _counted() as calls:
            loss = tropd_loss(leaf, targets, signal, **options).loss_T.sum()
            assert 0 < len(calls) <= 2 * num_chunks, calls
            assert all(size <= small for _, size in calls), calls
            del calls[:]
            loss.backward()
            assert calls == []
        for more, forward, backward in (
            (dict(), 0, 1),
            (dict(reduce_hidden_grad=False), 0, 0),
            (dict(sequence_parallel=True), 1, 1),
        ):
            hidden, weight = problem.products[0], problem.products[1][mine].clone()
            if "sequence_parallel" in more:
                hidden = hidden.chunk(place.size)[place.rank]
            hidden, weight = hidden.clone().requires_grad_(), weight.requires_grad_()
            with _way_to_compute(**way), _counted() as calls:
                output = tropd_loss_from_hidden(hidden, weight, targets, signal, **options, **more)
                assert 0 < len(calls) <= 2 * num_chunks + forward, calls
                large = [size for _, size in calls if size > small]
                assert len(large) <= forward, calls
                del calls[:]
                output.loss.backward()
                assert len(calls) == backward, calls
                assert all(size <= num * HIDDEN * 4 for _, size in calls)


def _check_refusals(case, problem, place):
    """Shards that do not lie where they are said to: every rank says so, none waits."""
    mine = place.columns(problem, "student")
    hidden, weight = problem.products[0], problem.products[1][mine]
    student, targets = problem.student[:, mine], _targets(case.tokens)
    options = _options(problem, case, place, metrics=True)
    unaligned = _signal("hidden", problem, case, place, aligned=False)
    with pytest.raises(ValueError, match="align_output_weight"):
        tropd_loss_from_hidden(hidden, weight, targets, unaligned, **options)

    logits = _signal("logits", problem, case, place, aligned=False)
    with pytest.raises(ValueError, match="Expected 96 tokens everywhere"):  # 4 x all rows
        tropd_loss_from_hidden(
            hidden, weight, targets, _signal("logits", problem, case, place, aligned=True),
            **options, sequence_parallel=True,
        )  # fmt: skip
    for bounds in ([0, 10, 20, 40], [0, 10, 20, 30, 39], [0, 9, 20, 30, 40], [0, 30, 20, 10, 40]):
        if len(bounds) == 5 and bounds[place.rank + 1] - bounds[place.rank] == student.shape[1]:
            continue  # this rank's own shard fits; its neighbour's does not
        for call in (
            lambda given: tropd_loss(student, targets, logits, **given),
            lambda given: tropd_loss_from_hidden(hidden, weight, targets, logits, **given),
        ):
            with pytest.raises(ValueError, match=r"Expected .*bounds|Expected bounds"):
                call(options | {"bounds": bounds})
    with pytest.raises(ValueError, match="all 41 columns of the vocabulary, found 40 in 4"):
        tropd_loss(student, targets, logits, **options | {"vocab_size": 41})


def _check_not_a_number(case, problem, place):
    """A rank with a broken column: nan on all ranks, in that row only, and nobody hangs."""
    mine = place.columns(problem, "student")
    options = _options(problem, case, place, metrics=True)
    signal = _signal("logits", problem, case, place, aligned=True)
    for row, column in ((3, 12), (0, 36)):
        student = problem.student.clone()
        student[row, column] = math.nan
        leaf = student[:, mine].clone().requires_grad_()
        output = tropd_loss(leaf, _targets(case.tokens), signal, **options)
        output.loss_T.sum().backward()
        expected = torch.arange(len(output.loss_T)) == row
        assert torch.equal(output.loss_T.isnan(), expected)
        assert leaf.grad[~expected][:, : max(0, 37 - mine.start)].isfinite().all()
        _check_same_on_ranks([output.loss_T.detach().nan_to_num(nan=7.0)], place.group)
        # Left out, it is no more than any other.
        targets = replace(_targets(case.tokens), weights_T=(~expected).float())
        leaf = leaf.detach().requires_grad_()
        output = tropd_loss(leaf, targets, signal, **options)
        output.loss_T.sum().backward()
        assert output.loss_T.isfinite().all() and leaf.grad.isfinite().all()
        assert output.loss_T[row] == 0 and torch.all(leaf.grad[row] == 0)


def _check_ids_of_no_rank(problem, place):
    """A look-up of -100, of padding or beyond is nan on all ranks; nobody else's token is."""
    num = len(problem.tokens.ids)
    mine, teacher = place.columns(problem, "student"), problem.real("teacher").double()
    student_only = replace(problem.tokens, is_teacher=torch.zeros(num, dtype=torch.bool))
    logprobs = teacher.log_softmax(-1).float()
    top = reference.top_k_ids(teacher, 4)
    for row, wrong in enumerate((-100, -1, problem.vocab_size, problem.student.shape[1], 2**40)):
        broken = torch.arange(num) == row
        ids, topk = student_only.ids.masked_fill(broken, wrong), top.clone()
        topk[row, 1] = wrong
        tokens = replace(student_only, ids=ids)
        for name, given, more in (
            ("logits", tokens, None),
            ("top_k", tokens, TopKSignal(logprobs[:, 0], top, logprobs.gather(-1, top))),
            ("their ids", student_only, TopKSignal(logprobs[:, 0], topk, logprobs.gather(-1, top))),
        ):
            case = _case(name, "fp32", problem, dict(region="none", top_k=4))
            config = config_of(objective="local_support", top_k=4) if name == "their ids" else None
            options = _options(problem, case, place, metrics=True)
            options |= dict(config=config or config_of(region="none"))
            leaf = problem.student[:, mine].clone().requires_grad_()
            signal = more or _signal("logits", problem, case, place, aligned=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensors, "can_be_asked", lambda tensor: False)
                output = tropd_loss(leaf, _targets(given), signal, **options)
                if name == "logits":
                    found = top_k_signal(
                        problem.teacher[:, place.columns(problem, "teacher")], ids, 4,
                        vocab_size=problem.vocab_size, group=place.group,
                    )  # fmt: skip
                    assert torch.equal(found.sampled_logprobs_T.isnan(), broken)
            assert torch.equal(output.loss_T.isnan(), broken), (name, wrong)
            output.loss_T.sum().backward()
            real = max(0, min(problem.vocab_size - mine.start, leaf.shape[1]))
            assert not real or torch.equal(leaf.grad[:, :real].isnan().any(-1), broken)


def test_ids_of_no_rank_tp1(problems):
    _check_ids_of_no_rank(problems["fp32"], Place(None))


# ---- the cases themselves ----


def test_cases_reach_every_branch(cases, problems):
    """Both sides of each region, tokens of both writers, ties across the edge of the top-k."""
    by_name = {case.name: case for case in cases}
    for where in ("fp32", "bf16", "edges"):
        problem = problems[where]
        student = ~problem.tokens.is_teacher
        assert problem.tokens.is_teacher.sum() > 2
        for name in ("bernoulli-forward_kl", "threshold-mask", "threshold-floor"):
            found = by_name[f"{name} on {where}"].answer.values
            assert 2 < found["outlier"].sum() < student.sum() - 2, (name, where)
        for name in ("opd-band", "opd-ppo", "expected-mask-ppo", "bernoulli-clip-ppo"):
            dropped = by_name[f"{name} on {where}"].answer.values["dropped"]
            assert 1 < dropped.sum() < student.sum() - 1, (name, where)
        entropy = by_name[f"eopd on {where}"].answer.values["teacher_entropy"][student]
        uncertain = entropy > SETTINGS["eopd"]["entropy_forward_kl"]
        assert 2 < uncertain.sum() < len(uncertain) - 2, where
    edges = problems["edges"]
    tied = edges.real("teacher").sort(descending=True).values[:, 3:5]
    assert (tied[:, 0] == tied[:, 1]).sum() > 3
    assert by_name["opd on edges"].answer.values["dropped"].sum() > 3


def test_cases_are_clear_of_their_thresholds(cases, problems):
    """A draw so close to its threshold that rounding decides says nothing about the code."""
    for case in cases:
        found, problem = case.answer.values, problems[case.problem]
        student = ~problem.tokens.is_teacher
        error = 3 * _relative_error(problem)
        ratio, entropy = -found["k1"], found["teacher_entropy"]
        clear = [(problem.tokens.uniforms - found["trust"]).abs() > error]
        floor = reference.reward_floor(reference.DEFAULTS | case.settings)
        if floor is not None:
            clear.append((ratio - floor).abs() > error)
        if limit := case.settings.get("entropy_forward_kl"):
            clear.append((entropy - limit).abs() > error)
        for name in ("importance_low", "importance_high"):
            if (limit := case.settings.get(name)) is not None:
                clear.append((found["importance"] - limit).abs() > error)
        for column in clear:
            assert column[student].all(), case.name


def test_every_setting_is_a_config(cases):
    """What the reference and the code are given is the same, and nothing is left out."""
    for case in cases:
        config_of(**case.settings)
    for name, default in DEFAULTS.items():
        if name in reference.DEFAULTS:
            assert reference.DEFAULTS[name] == default, name
        else:
            assert name in (*reference.BATCH_WIDE, "mask_first_ids", "mask_truncated"), name
    assert {f"preset {name} on 507 columns" for name in FLAT} <= {case.name for case in cases}
