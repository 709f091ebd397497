"""What follows from the definition of the losses, and what their callers may rely on; one rank.

Value and gradient of every loss are compared with the reference in ``distributed/test_losses.py``;
here the reference itself is checked, by finite differences and by enumeration.
"""

import dataclasses
import math
from functools import partial

import pytest
import reference
import torch
from loss_settings import FLAT, config_of
from reference import Tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    TopKSignal,
    align_output_weight,
    check_signal,
    keyed_uniform,
    preset,
    required_signal,
    tensors,
    token_statistics,
    top_k_signal,
    tropd_loss,
    tropd_loss_from_hidden,
)

OUTLIERS = {
    "forward_kl": dict(top_k=4),
    "full": dict(top_k=0),
    "mask": dict(outlier="mask"),
    "clip": dict(outlier="clip", tau=-0.5),
}
OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "local_support")


def _targets(ids, **known):
    num = len(ids)
    return LossTargets(
        **dict(
            ids_T=ids, is_teacher_T=torch.zeros(num, dtype=torch.bool), uniforms_T=torch.zeros(num)
        )
        | known
    )


def _loss(student, signal, ids, *, config=None, known=None, **settings):
    settings = dict(beta=0.001, vocab_size=student.shape[-1], group=None) | settings
    config = config or config_of(top_k=4)
    return tropd_loss(student, _targets(ids, **known or {}), signal, config=config, **settings)


def _from_hidden(hidden, weight, signal, ids, *, config=None, known=None, **settings):
    settings = dict(beta=0.001, vocab_size=len(weight), group=None) | settings
    config, targets = config or config_of(top_k=4), _targets(ids, **known or {})
    return tropd_loss_from_hidden(hidden, weight, targets, signal, config=config, **settings)


def _settings_of(name, **changes):
    """A preset whose top-k fits a vocabulary of 12."""
    settings = dict(FLAT[name]) | changes
    return settings | {"top_k": min(settings.get("top_k", 64), 4)}


# ---- the reference ----


def _pair(num=8, vocab=7):
    draw = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, num, vocab, generator=draw, dtype=torch.float64)
    tokens = Tokens(
        torch.randint(vocab, (num,), generator=draw),
        torch.arange(num) % 3 == 0,
        torch.rand(num, generator=draw),
        torch.rand(num, generator=draw) + 0.5,
    )
    return student, teacher, tokens


_BACKPROPAGATED = [
    dict(objective=objective, teacher_tokens=writer, jsd_beta=0.3, top_k=4)
    for objective in OBJECTIVES
    for writer in ("nll", "same")
]
_BACKPROPAGATED += [
    dict(method="trb", support=support, renormalise=renormalise, top_k=4)
    for support in ("student", "teacher")
    for renormalise in (False, True)
]
# Every token an outlier.
_BACKPROPAGATED += [dict(region="threshold", tau=1e9, top_k=k) for k in (0, 3)]


@pytest.mark.parametrize("settings", _BACKPROPAGATED, ids=str)
def test_reference_gradient_is_the_slope_of_its_value(settings):
    student, teacher, tokens = _pair()
    found = reference.answer(student, teacher, tokens, settings, beta=0.3).gradient_TV
    for column in range(student.shape[1]):
        step = torch.zeros_like(student)
        step[:, column] = 1e-6
        up, down = (
            reference.losses(student + sign * step, teacher, tokens, settings, beta=0.3)[1]["loss"]
            for sign in (1, -1)
        )
        torch.testing.assert_close(found[:, column], (up - down) / 2e-6, rtol=0, atol=1e-8)


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_reference_sampled_forms_average_to_the_exact_one(outlier):
    """By enumeration: all tokens x with their probability, and both sides of the draw."""
    student, teacher, _tokens = _pair()
    student, teacher = student[:1], teacher[:1]
    vocab = student.shape[1]

    def answer(region, ids, uniforms):
        tokens = Tokens(ids, torch.zeros(len(ids)).bool(), uniforms)
        rows = student.expand(len(ids), -1), teacher.expand(len(ids), -1)
        return reference.answer(*rows, tokens, dict(region=region) | OUTLIERS[outlier], beta=0.3)

    x, q = torch.arange(vocab), student[0].softmax(-1)
    exact = answer("exact", x[:1], torch.zeros(1))
    expected = answer("expected", x, torch.zeros(vocab))
    trust = expected.values["trust"]
    inside = answer("bernoulli", x, trust - 1e-9)
    outside = answer("bernoulli", x, trust + 1e-9)
    for of in (lambda a: a.gradient_TV, *(_value(n) for n in ("term", "outlier"))):
        share = trust.unsqueeze(-1) if of(expected).dim() == 2 else trust
        drawn = share * of(inside) + (1 - share) * of(outside)
        torch.testing.assert_close(drawn, of(expected), rtol=0, atol=1e-12)
        mean = torch.tensordot(q, of(expected), dims=1)
        torch.testing.assert_close(mean, of(exact)[0], rtol=0, atol=1e-12)


def _value(name):
    return lambda found: found.values[name]


# ---- sampled forms ----


def _sampled_from_student(num=40_000, vocab=12):
    """One pair of distributions at every position, tokens drawn from the student's."""
    draw = torch.Generator().manual_seed(11)
    q_logits, p_logits = torch.randn(2, vocab, generator=draw) * 1.5
    ids = torch.multinomial(q_logits.softmax(0), num, replacement=True, generator=draw)
    uniforms = torch.from_numpy(keyed_uniform(5, 6, 7, range(num)))
    return q_logits, p_logits, ids, uniforms


def _drawn(**settings):
    """(values, [N, V] gradients) of many tokens, every position the same pair."""
    q_logits, p_logits, ids, uniforms = _sampled_from_student()
    logits = q_logits.repeat(len(ids), 1).requires_grad_()
    signal = LogitsSignal(p_logits.expand(len(ids), -1), 12)
    known = dict(uniforms_T=uniforms)
    output = _loss(logits, signal, ids, config=config_of(**settings), known=known)
    output.loss_T.sum().backward()
    return output.values, logits.grad


def _within(samples, expected, deviations=5.0):
    error = samples.double().std() / len(samples) ** 0.5
    assert abs(float(samples.double().mean()) - expected) <= deviations * float(error) + 1e-6


def test_mean_of_sampled_outlier_is_total_variation():
    q_logits, p_logits, *_ = _sampled_from_student()
    p, q = p_logits.double().softmax(0), q_logits.double().softmax(0)
    tv = 1 - float(torch.minimum(p, q).sum())
    assert 0.2 < tv < 0.8
    values, _ = _drawn(top_k=4)
    torch.testing.assert_close(values["tv"], torch.full_like(values["tv"], tv))
    _within(values["outlier"], tv)
    _within(1 - values["trust"], tv)
    _within(values["k1"], float((q * (q.log() - p.log())).sum()))


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_sampled_forms_average_to_the_exact_one(outlier):
    """Over x ~ q and the draw, value and gradient; and the noise of the gradient falls."""
    values, gradient = _drawn(region="exact", **OUTLIERS[outlier])
    noise = {"exact": float(gradient.double().var(dim=0).sum())}
    for region in ("bernoulli", "expected"):
        drawn, gradients = _drawn(region=region, **OUTLIERS[outlier])
        for name in ("term", "outlier"):
            _within(drawn[name], float(values[name][0]))
        for column, expected in zip(gradients.unbind(-1), gradient[0].tolist(), strict=True):
            _within(column, expected)
        noise[region] = float(gradients.double().var(dim=0).sum())
    assert noise["bernoulli"] > 1.01 * noise["expected"]
    assert noise["expected"] > 1e6 * noise["exact"]


def test_opd_averages_to_the_gradient_of_reverse_kl():
    values, gradient = _drawn(objective="reverse_kl")
    drawn, gradients = _drawn(region="none")
    _within(drawn["term"], float(values["term"][0]))
    for column, expected in zip(gradients.unbind(-1), gradient[0].tolist(), strict=True):
        _within(column, expected)


# ---- single tokens ----


_UNEQUAL = ("eopd", "top_d", "aopd", "opsa", "veto_forward_kl", "veto_reverse_kl")


# AOPD imitates at p = q, OPSA asks no teacher, and Veto's target is sharper than either model.
@pytest.mark.parametrize("name", [n for n in FLAT if n not in _UNEQUAL])
def test_equal_models_have_no_outlier_and_no_gradient(name):
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    settings = _settings_of(name, region="expected") if name == "tropd_expected" else None
    config = config_of(**settings or _settings_of(name))
    known = dict(uniforms_T=torch.full((50,), 1 - 2.0**-24))
    signal = LogitsSignal(logits.detach(), 12)
    output = _loss(logits, signal, torch.arange(50) % 12, config=config, known=known)
    output.loss_T.sum().backward()
    assert torch.all(output.values["trust"] == 1)
    torch.testing.assert_close(output.values["outlier"], torch.zeros(50), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(50, 12), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss_T, torch.zeros(50), rtol=0, atol=1e-6)


def test_token_the_teacher_never_writes_is_an_outlier():
    teacher = torch.zeros(1, 6)
    teacher[0, 2] = -torch.inf
    for region in ("bernoulli", "expected", "threshold"):
        for outlier in ("forward_kl", "mask", "clip"):
            logits = torch.zeros(1, 6).requires_grad_()
            config = config_of(region=region, outlier=outlier, top_k=4, tau=-2.0)
            output = _loss(logits, LogitsSignal(teacher, 6), torch.tensor([2]), config=config)
            output.loss_T.sum().backward()
            assert output.values["outlier"].item() == 1 and output.values["trust"].item() == 0
            assert output.values["dropped"].item() == 0
            assert output.loss_T.isfinite().all() and logits.grad.isfinite().all()


def test_gradient_step_lowers_what_each_term_says():
    """Down the gradient, the teacher's token and the teacher's top-k become more likely."""
    draw = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 1, 12, generator=draw)
    rare = (student.log_softmax(-1) - teacher.log_softmax(-1)).argmax(-1)
    backpropagated = [config_of(objective=objective, top_k=4) for objective in OBJECTIVES]
    for is_teacher, config in [(True, None), *((False, c) for c in [None, *backpropagated])]:
        logits = student.clone().requires_grad_()
        known = dict(is_teacher_T=torch.tensor([is_teacher]), uniforms_T=torch.tensor([0.999]))
        signal, settings = LogitsSignal(teacher, 12), dict(beta=1.0, config=config, known=known)
        output = _loss(logits, signal, rare, **settings)
        output.loss_T.sum().backward()
        after = _loss(student - 0.1 * logits.grad, signal, rare, **settings)
        assert after.loss_T.item() < output.loss_T.item()


LOG2 = math.log(2)
E2 = math.log((2 / 3) / (1 / 4)) * 2 / 3 + math.log((1 / 3) / (1 / 2)) / 3
KNOWN = {
    "trusted": (dict(), 0.49, None, LOG2),
    # top-2 of p, ties to the lower id: tokens 1 and 0.
    "outlier": (dict(), 0.51, None, 0.5 * LOG2 - 0.25 * LOG2),
    "clipped": (dict(outlier="clip", tau=-0.5), 0.51, None, 0.5),
    "masked": (dict(outlier="mask"), 0.51, None, 0.0),
    "expected": (dict(region="expected"), 0.0, None, 0.625 * LOG2),
    "exact": (dict(region="exact"), 0.0, None, 0.25 * 0.25 * LOG2),
    "above": (dict(region="threshold", tau=-0.7), 0.0, None, LOG2),
    "below": (dict(region="threshold", tau=-0.6), 0.0, None, 0.25 * LOG2),
    "proximal": (dict(region="none", reward="proximal"), 0.0, None, -math.log(0.1 * 0.5 + 0.9)),
    "entropy 1.04": (dict(region="none", entropy_forward_kl=1.0), 0.0, None, LOG2 + E2),
    "entropy 1.04 low": (dict(region="none", entropy_forward_kl=1.1), 0.0, None, LOG2),
    "forward_kl": (dict(objective="forward_kl"), 0.0, None, 0.25 * LOG2),
    "reverse_kl": (dict(objective="reverse_kl"), 0.0, None, 0.25 * LOG2),
    "jsd": (
        dict(objective="jsd"), 0.0, None, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    ),
    "local_support": (dict(objective="local_support"), 0.0, None, LOG2 / 3),
    "ppo far above": (dict(region="none", importance="ppo"), 0.0, 3.0, 3 * LOG2),
    "ppo far below": (dict(region="none", importance="ppo"), 0.0, 0.25, 0.5 * LOG2),
    "truncated": (dict(region="none", importance="truncated"), 0.0, 3.0, 2 * LOG2),
    "band inside": (dict(region="none", importance="band"), 0.0, 0.75, 0.75 * LOG2),
    "band outside": (dict(region="none", importance="band"), 0.0, 3.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_value_of_a_known_token(name):
    """Q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4), x = 0: m = 1/2, log p/q = -log 2, TV = 1/4."""
    settings, uniform, rho, expected = KNOWN[name]
    student = torch.tensor([[2.0, 1.0, 1.0]]).log()
    teacher = torch.tensor([[1.0, 2.0, 1.0]]).log()
    known = dict(uniforms_T=torch.tensor([uniform]), weights_T=torch.tensor([2.0]))
    if rho is not None:
        known["rollout_logprobs_T"] = torch.tensor([0.5 / rho]).log()
    config, ids = config_of(top_k=2, **settings), torch.tensor([0])
    output = _loss(student, LogitsSignal(teacher, 3), ids, config=config, known=known)
    assert output.values["term"].item() == pytest.approx(expected, abs=1e-6)
    assert output.loss_T.item() == pytest.approx(2 * expected, abs=1e-6)
    assert output.values["trust"].item() == pytest.approx(0.5)
    assert output.values["tv"].item() == pytest.approx(0.25)
    assert output.values["importance"].item() == pytest.approx(1.0 if rho is None else rho)
    assert output.values["dropped"].item() == (name in ("ppo far below", "band outside"))
    if config.needs.top_k:
        assert output.values["topk_mass_teacher"].item() == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["ppo far above", "ppo far below", "truncated", "band outside"])
def test_gradient_of_a_known_stale_token(name):
    """As above: coef x (one-hot - q), coef = -(reward -log 2) x the factor, or 0 where dropped."""
    settings, _uniform, rho, _value = KNOWN[name]
    student = torch.tensor([[2.0, 1.0, 1.0]]).log().requires_grad_()
    teacher = torch.tensor([[1.0, 2.0, 1.0]]).log()
    known = dict(rollout_logprobs_T=torch.tensor([0.5 / rho]).log())
    config = config_of(top_k=2, **settings)
    signal = LogitsSignal(teacher, 3)
    _loss(student, signal, torch.tensor([0]), config=config, known=known).loss_T.sum().backward()
    factor = {"ppo far above": 3.0, "truncated": 2.0}.get(name, 0.0)
    expected = factor * LOG2 * torch.tensor([[0.5, -0.25, -0.25]])
    torch.testing.assert_close(student.grad, expected)


# ---- what callers rely on ----


def _models(num, vocab, hidden=8, seed=3, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((num, hidden), (vocab, hidden), (num, hidden), (vocab, hidden))
    tensors = [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]
    known = dict(
        is_teacher_T=torch.rand(num, generator=draw) < 0.3,
        uniforms_T=torch.rand(num, generator=draw),
        weights_T=torch.rand(num, generator=draw) + 0.5,
    )
    return *tensors, torch.randint(vocab, (num,), generator=draw), known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_top_k_signals_agree_with_logits(dtype):
    student, _weight, hidden, weight, ids, known = _models(20, 16, dtype=dtype)
    student = student.float().repeat(1, 2)
    logits = hidden @ weight.t()
    signals = [
        LogitsSignal(logits, 13),
        HiddenStatesSignal(hidden, weight, 13),
        top_k_signal(logits, ids % 13, 6, vocab_size=13, group=None),
    ]
    runs = []
    for signal in signals:
        leaf = student.clone().requires_grad_()
        output = _loss(leaf, signal, ids % 13, vocab_size=13, known=known)
        output.loss_T.sum().backward()
        runs.append((output.loss_T.detach(), leaf.grad))
    for loss, grad in runs[1:]:
        torch.testing.assert_close(loss, runs[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, runs[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_dtypes(dtype):
    """Gradients come back in the dtype that went in; float32 in between."""
    student, _weight, teacher, _weight, ids, known = _models(20, 8, dtype=dtype)
    leaf = student.clone().requires_grad_()
    output = _loss(leaf, LogitsSignal(teacher, 8), ids, known=known)
    output.loss_T.sum().backward()
    assert output.loss_T.dtype == torch.float32 and leaf.grad.dtype == dtype
    tokens = Tokens(ids, known["is_teacher_T"], known["uniforms_T"], known["weights_T"])
    expected = reference.answer(student, teacher, tokens, dict(top_k=4), beta=0.001)
    loss = expected.values["loss"].float()
    torch.testing.assert_close(output.loss_T.detach(), loss, rtol=1e-5, atol=1e-5)
    grad = expected.gradient_TV.to(dtype)
    torch.testing.assert_close(leaf.grad, grad, rtol=1e-3, atol=1e-5)


def test_teacher_padded_wider_than_the_student_on_one_rank():
    draw = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(5, 10, generator=draw), torch.randn(5, 14, generator=draw)
    ids = torch.arange(5)
    wide = _loss(student, LogitsSignal(teacher, 9), ids, vocab_size=9)
    narrow = _loss(student[:, :9], LogitsSignal(teacher[:, :9], 9), ids, vocab_size=9)
    assert torch.equal(wide.loss_T, narrow.loss_T)


WIDE = (
    dict(top_k=8),
    dict(region="exact", top_k=0),
    dict(region="exact", outlier="clip", tau=-0.5),
    dict(objective="jsd", teacher_tokens="same"),
    dict(objective="reverse_kl"),
    dict(objective="local_support", top_k=8),
    dict(region="none", outlier="mask"),
)


@pytest.mark.parametrize("settings", WIDE, ids=str)
def test_a_small_budget_changes_nothing(settings):
    """40 tokens x 20,000 columns in little memory: many chunks, a ragged one, the same numbers."""
    hidden, weight, near, close, ids, known = _models(40, 20_000)
    near, close = 0.5 * (hidden + near), 0.5 * (weight + close)
    config = config_of(**settings)
    teacher = HiddenStatesSignal(near, close, 20_000)
    tokens = Tokens(ids, known["is_teacher_T"], known["uniforms_T"], known["weights_T"])
    expected = reference.answer(
        hidden.double() @ weight.double().t(), near.double() @ close.double().t(), tokens,
        settings, beta=0.001,
    )  # fmt: skip
    grad = expected.gradient_TV
    wanted = (expected.values["loss"], grad @ weight.double(), grad.t() @ hidden.double())
    for memory in (None, 1, 10):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        settings = dict(config=config, known=known, memory_mib=memory)
        output = _from_hidden(*leaves, teacher, ids, **settings)
        output.loss.backward()
        found = (output.values["loss"], leaves[0].grad, leaves[1].grad)
        for actual, good in zip(found, wanted, strict=True):
            error = 2e-5 * float(good.abs().max())
            torch.testing.assert_close(actual.double(), good, rtol=2e-5, atol=error)
        logits = (hidden @ weight.t()).requires_grad_()
        output = _loss(logits, teacher, ids, **settings)
        output.loss_T.sum().backward()
        torch.testing.assert_close(output.loss_T.double(), wanted[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(logits.grad.double(), grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", FLAT)
def test_gradient_does_not_depend_on_how_tokens_are_batched(name):
    """The same tokens in one micro-batch, in several, and packed in another order."""
    num, vocab = 30, 12
    hidden, weight, near, close, ids, known = _models(num, vocab)
    known["rollout_logprobs_T"] = torch.full((num,), -2.0)
    config = config_of(**_settings_of(name))
    order = torch.randperm(num, generator=torch.Generator().manual_seed(1))

    def run(batches):
        leaf, layer = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        main_grad, losses = torch.zeros_like(weight), torch.zeros(num)
        for rows in batches:
            output = _from_hidden(
                leaf[rows],
                layer,
                HiddenStatesSignal(near[rows], close, vocab),
                ids[rows],
                config=config,
                known={key: value[rows] for key, value in known.items()},
                main_grad=main_grad,
            )
            output.loss.backward()
            losses[rows] = output.values["loss"]
        return losses, leaf.grad, main_grad

    whole = run([torch.arange(num)])
    for batches in ([torch.arange(7), torch.arange(7, 8), torch.arange(8, num)], order.split(11)):
        for actual, expected in zip(run(batches), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_repeated_run_gives_the_same_bits():
    hidden, weight, near, close, ids, known = _models(50, 300)
    runs = []
    for _ in range(2):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        signal = HiddenStatesSignal(near, close, 300)
        output = _from_hidden(*leaves, signal, ids, known=known, memory_mib=1)
        output.loss.backward()
        runs.append((output.loss.detach(), *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_weights_multiply_and_zero_leaves_out():
    student, teacher = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(5))
    ids, weights = torch.arange(6), torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 3.0])
    runs = []
    for given in (None, torch.ones(6), weights):
        leaf = student.clone().requires_grad_()
        output = _loss(leaf, LogitsSignal(teacher, 12), ids, known=dict(weights_T=given))
        output.loss_T.sum().backward()
        runs.append((output.loss_T.detach(), leaf.grad, output.values["term"]))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    torch.testing.assert_close(runs[2][0], weights * runs[0][0])
    torch.testing.assert_close(runs[2][1], weights.unsqueeze(-1) * runs[0][1])
    assert torch.equal(runs[2][2], runs[0][2])


def test_an_infinite_term_stays_in_its_token():
    """KL to a model that excludes what the other writes is infinite; weight 0 silences it."""
    for objective, excluding in (("forward_kl", "student"), ("reverse_kl", "teacher")):
        both = dict(zip(("student", "teacher"), torch.randn(2, 4, 6), strict=True))
        both[excluding][1, 3] = -torch.inf
        config, ids = config_of(objective=objective), torch.zeros(4, dtype=torch.long)
        for weight in (1.0, 0.0):
            weights = torch.tensor([1.0, weight, 1.0, 1.0])
            leaf = both["student"].clone().requires_grad_()
            signal, known = LogitsSignal(both["teacher"], 6), dict(weights_T=weights)
            output = _loss(leaf, signal, ids, config=config, known=known)
            output.loss_T.sum().backward()
            assert output.values["term"][1] == torch.inf
            assert output.loss_T[1] == (torch.inf if weight else 0.0)
            others = torch.tensor([0, 2, 3])
            assert output.loss_T[others].isfinite().all() and leaf.grad[others].isfinite().all()
            if not weight:
                assert torch.all(leaf.grad[1] == 0)


@pytest.mark.parametrize("broken", ["student", "teacher"])
@pytest.mark.parametrize("name", FLAT)
def test_a_broken_model_is_seen_in_the_loss(name, broken):
    both = dict(zip(("student", "teacher"), torch.randn(2, 3, 12), strict=True))
    both[broken][1, 4] = torch.nan
    config, known = config_of(**_settings_of(name)), dict(rollout_logprobs_T=torch.zeros(3))
    signal = LogitsSignal(both["teacher"], 12)
    output = _loss(both["student"], signal, torch.arange(3), config=config, known=known)
    assert output.loss_T.isnan().tolist() == [False, True, False]


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, near, close, ids, known = _models(9, 12)
    signal = HiddenStatesSignal(near.requires_grad_(), close.requires_grad_(), 12)
    for which in ((True, False), (False, True)):
        leaves = [
            tensor.clone().requires_grad_(wanted)
            for tensor, wanted in zip((hidden, weight), which, strict=True)
        ]
        _from_hidden(*leaves, signal, ids, known=known).loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == list(which)
    assert near.grad is None and close.grad is None
    output = _from_hidden(hidden, weight, signal, ids, known=known)
    assert not output.loss.requires_grad
    with torch.no_grad():
        leaf = hidden.clone().requires_grad_()
        assert torch.equal(_from_hidden(leaf, weight, signal, ids, known=known).loss, output.loss)


def test_backward_from_hidden_states_works_once():
    hidden, weight, near, close, ids, known = _models(9, 12)
    signal = HiddenStatesSignal(near, close, 12)
    output = _from_hidden(hidden.requires_grad_(), weight, signal, ids, known=known)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        output.loss.backward()


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest storage any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() for t in tree_leaves(result) if torch.is_tensor(t)]
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor, size in zip(filter(torch.is_tensor, tree_leaves(result)), made, strict=True):
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, size)
        return result


@pytest.mark.parametrize("settings", WIDE[:4], ids=str)
def test_temporaries_are_bounded_by_the_budget(settings):
    """No tensor larger than the 2 MiB allowed, where the logits have 8."""
    tokens, vocab, budget = 256, 8192, 2
    hidden, weight, near, close, ids, known = _models(tokens, vocab)
    signal = HiddenStatesSignal(near, close, vocab)
    options = dict(config=config_of(**settings), known=known, memory_mib=budget)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with _LargestTensor() as largest:
        output = _from_hidden(*leaves, signal, ids, **options)
        output.loss.backward()
    assert largest.bytes <= budget * 2**20
    student = torch.randn(tokens, vocab).to(torch.bfloat16).requires_grad_()
    with _LargestTensor() as largest:
        output = _loss(student, signal, ids, **options)
    assert largest.bytes <= budget * 2**20
    with _LargestTensor() as largest:
        output.loss_T.sum().backward()
    assert largest.bytes == tokens * vocab * 2  # the gradient itself


# ---- signals ----


def test_required_signal():
    """Of every published method, and of the variants that need more or less."""
    sampled, top_k, full = {"sampled"}, {"sampled", "top_k"}, {"sampled", "full"}
    needs = {name: sampled for name in FLAT} | {
        "tropd": top_k,
        "tropd_expected": top_k,
        "tropd_exact": top_k | full,
        "tropd_exact_full": full,
        "eopd": top_k | full,
        "local_support": top_k,
        "trb": top_k | full,
        **{name: full for name in ("gkd_forward_kl", "gkd_reverse_kl", "gkd_jsd")},
        **{name: full for name in ("minillm_single_step", "power_opd_exact")},
        **{name: full for name in ("veto_forward_kl", "veto_reverse_kl")},
        "aopd": top_k,
    }
    for name, expected in needs.items():
        assert required_signal(preset(name)) == expected, name
    assert required_signal(config_of(top_k=0)) == full
    assert required_signal(config_of(region="exact", outlier="mask")) == full
    assert required_signal(config_of(outlier="mask", top_k=0)) == sampled


class _SampledOnly:
    provides = frozenset({"sampled"})
    num_tokens = 0


def test_signal_mismatch_names_both():
    check_signal(config_of(region="none"), _SampledOnly, vocab_size=100)
    with pytest.raises(ConfigError) as caught:
        check_signal(config_of(), _SampledOnly, vocab_size=100)
    for part in ("tropd", "most likely ids", "only the log-prob of each sampled token", "opd"):
        assert part in str(caught.value)


def _top_k_of(num, k):
    return TopKSignal(
        torch.full((num,), -1.0), torch.arange(k).expand(num, k), torch.full((num, k), -2.0)
    )


@pytest.mark.parametrize(
    "settings",
    [
        dict(region="exact"),
        dict(top_k=0),
        dict(region="none", entropy_forward_kl=0.8, top_k=4),
        *(dict(objective=objective) for objective in ("forward_kl", "reverse_kl", "jsd")),
    ],
    ids=str,
)
def test_top_k_signal_does_not_serve_a_loss_over_the_vocabulary(settings):
    with pytest.raises(
        ConfigError, match=r"the whole distribution.*gives only its most likely ids"
    ):
        _loss(
            torch.zeros(3, 6), _top_k_of(3, 4), torch.arange(3),
            config=config_of(**dict(top_k=4) | settings),
        )  # fmt: skip


def test_top_k_larger_than_the_vocabulary():
    with pytest.raises(ConfigError, match=r"vocabulary of 40 tokens, found 64"):
        check_signal(config_of(), HiddenStatesSignal, vocab_size=40)
    check_signal(config_of(top_k=40), HiddenStatesSignal, vocab_size=40)
    with pytest.raises(ConfigError, match=r"vocabulary of 6 tokens, found 7"):
        _loss(torch.zeros(1, 6), LogitsSignal(torch.zeros(1, 6), 6), torch.tensor([2]),
              config=config_of(top_k=7))  # fmt: skip
    # A loss without a top-k reports the mass of what there is.
    student = torch.zeros(1, 6)
    config = config_of(region="none")
    output = _loss(student, LogitsSignal(student, 6), torch.tensor([2]), config=config)
    assert output.values["topk_mass_teacher"].item() == pytest.approx(1.0)


# ---- bad input ----


def test_lengths_that_do_not_fit_together():
    student, ids = torch.zeros(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"found \{'the teacher signal': 2\}"):
        _loss(student, LogitsSignal(student[:2], 6), ids)
    for name in ("is_teacher_T", "uniforms_T", "weights_T", "rollout_logprobs_T", "rewards_T"):
        short = torch.zeros(2, dtype=torch.bool if name == "is_teacher_T" else torch.float32)
        with pytest.raises(ValueError, match=rf"3 tokens everywhere.*targets\.{name}': 2"):
            _loss(student, LogitsSignal(student, 6), ids, known={name: short})


def test_vocabularies_that_do_not_fit_together():
    student, ids = torch.zeros(3, 6), torch.tensor([0, 1, 2])
    for wrong, found in (([0, 1, 6], r"0\.\.6"), ([0, -1, 5], r"-1\.\.5")):
        with pytest.raises(ValueError, match=rf"token ids in 0\.\.5 .*found {found}"):
            _loss(student, LogitsSignal(student, 6), torch.tensor(wrong))
    with pytest.raises(ConfigError, match="vocabulary of 6 tokens, found 5"):
        _loss(student, LogitsSignal(student, 5), ids)
    with pytest.raises(ConfigError, match=r"loss\.top_k = 4 .* found 2"):
        _loss(student, _top_k_of(3, 2), ids)
    wrong_ids = TopKSignal(torch.zeros(3), torch.full((3, 4), 6), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"token ids in 0\.\.5 .*top-k, found 6\.\.6"):
        _loss(student, wrong_ids, ids)
    with pytest.raises(ValueError, match="all 7 columns of the vocabulary, found 6 in 1"):
        _loss(student, LogitsSignal(student, 7), ids, vocab_size=7)
    for bounds in ([0], [0, 5], [1, 7], [0, 3, 6], [6, 0]):
        with pytest.raises(ValueError, match="bounds"):
            _loss(student, LogitsSignal(student, 6), ids, bounds=bounds)


def test_missing_rollout_logprobs():
    student = torch.zeros(3, 6)
    for importance in ("truncated", "band", "ppo"):
        config = config_of(region="none", importance=importance)
        with pytest.raises(ValueError, match=r"importance.*rollout_logprobs_T"):
            _loss(student, LogitsSignal(student, 6), torch.arange(3), config=config)


def test_no_memory_at_all():
    student = torch.zeros(3, 6)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        _loss(student, LogitsSignal(student, 6), torch.arange(3), memory_mib=0)


F3, W6 = torch.zeros(3, 4), torch.zeros(6, 4)
SHAPES = {
    "logits of one token": lambda: _loss(torch.zeros(6), LogitsSignal(F3, 6), torch.arange(3)),
    "a batch of sequences": lambda: _loss(
        torch.zeros(1, 3, 6), LogitsSignal(torch.zeros(1, 3, 6), 6), torch.arange(3)
    ),
    "integer logits": lambda: _loss(
        torch.zeros(3, 6).long(), LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3)
    ),
    "integer teacher": lambda: _loss(
        torch.zeros(3, 6), LogitsSignal(torch.zeros(3, 6).long(), 6), torch.arange(3)
    ),
    "weights per column": lambda: _loss(
        torch.zeros(3, 6), LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3),
        known=dict(weights_T=torch.ones(3, 3)),
    ),
    "ids per sequence": lambda: _loss(
        torch.zeros(3, 6), LogitsSignal(torch.zeros(3, 6), 6), torch.zeros(3, 1).long()
    ),
    "integer writers": lambda: _loss(
        torch.zeros(3, 6), LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3),
        known=dict(is_teacher_T=torch.zeros(3)),
    ),
    "ids that are no integers": lambda: _loss(
        torch.zeros(3, 6), LogitsSignal(torch.zeros(3, 6), 6), torch.zeros(3)
    ),
    "hidden states of another width": lambda: _from_hidden(
        F3[:, :3], W6, LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3)
    ),
    "hidden states of another dtype": lambda: _from_hidden(
        F3.bfloat16(), W6, LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3)
    ),
    "a batch of hidden states": lambda: _from_hidden(
        F3[None], W6, LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3)
    ),
    "the teacher's hidden states of another width": lambda: _from_hidden(
        F3, W6, HiddenStatesSignal(F3[:, :3], W6, 6), torch.arange(3)
    ),
    "the teacher's hidden states of another dtype": lambda: _from_hidden(
        F3, W6, HiddenStatesSignal(F3.bfloat16(), W6, 6), torch.arange(3)
    ),
    "a main_grad of another shape": lambda: _from_hidden(
        F3, W6, LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3), main_grad=torch.zeros(2, 4)
    ),
    "a main_grad of another dtype": lambda: _from_hidden(
        F3, W6, LogitsSignal(torch.zeros(3, 6), 6), torch.arange(3), main_grad=W6.bfloat16()
    ),
    "top-k ids without log-probs": lambda: _loss(
        torch.zeros(3, 6),
        TopKSignal(torch.zeros(3), torch.zeros(3, 5).long(), torch.zeros(3, 4)),
        torch.arange(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes_that_do_not_fit(name):
    with pytest.raises(ValueError, match=r"Expected .*found"):
        SHAPES[name]()


# ---- every tensor that enters ----


def _records(num=3, vocab=6, hidden=4, k=5):
    """Name -> a record with all of its tensors."""
    draw = torch.Generator().manual_seed(21)
    logprobs = torch.randn(num, vocab, generator=draw).log_softmax(-1)
    everything = LossTargets(
        torch.arange(num),
        torch.zeros(num, dtype=torch.bool),
        *(torch.full((num,), value) for value in (0.5, 1.0, -1.0, 0.25)),
    )
    states, layer = (torch.randn(rows, hidden, generator=draw) for rows in (num, vocab))
    full = HiddenStatesSignal(states, layer, vocab)
    top_k = TopKSignal(logprobs[:, 0], torch.arange(k).expand(num, k), logprobs[:, :k])
    logits = LogitsSignal(torch.randn(num, vocab, generator=draw), vocab)
    return {"targets": everything, "hidden": full, "top_k": top_k, "logits": logits}


def _run(records, signal, importance="truncated"):
    """Both entrances; the student is the record "logits" or "hidden"."""
    settings = dict(config=config_of(top_k=4, importance=importance), vocab_size=6, group=None)
    student, targets = records["student hidden"], records["targets"]
    logits = records["student logits"].logits_Tv.clone().requires_grad_()
    outputs = [tropd_loss(logits, targets, signal, **settings)]
    outputs[0].loss_T.sum().backward()
    hidden = student.hidden_TH.clone().requires_grad_()
    more = tropd_loss_from_hidden(hidden, student.output_weight_vH, targets, signal, **settings)
    more.loss.backward()
    return [outputs[0].loss_T.detach(), logits.grad, more.loss.detach(), hidden.grad]


def _all_records():
    records = _records()
    return records | {"student hidden": records["hidden"], "student logits": records["logits"]}


TENSORS = [
    (name, field.name)
    for name, record in _records().items()
    for field in dataclasses.fields(record)
    if torch.is_tensor(getattr(record, field.name))
]


def _wrong_tensors(good):
    """What users give in place of a tensor."""
    yield "one number each in a row of its own", good.unsqueeze(-1)
    yield "a token more", torch.cat([good, good[:1]])
    yield "a scalar", good.flatten()[0]
    yield "another family of types", good.long() if good.is_floating_point() else good.float()
    yield "another device", good.to("meta")
    yield "no tensor", good.tolist()


@pytest.mark.parametrize(
    ("who", "name", "field"),
    [
        *(("teacher", *tensor) for tensor in TENSORS),
        *(("student", *tensor) for tensor in TENSORS if tensor[0] in ("logits", "hidden")),
    ],
    ids=str,
)
def test_every_tensor_is_checked(who, name, field):
    """Whatever record it is in and whoever brings it: the message says what was found."""
    good = _all_records()
    for what, wrong in _wrong_tensors(getattr(good[name], field)):
        changed = dataclasses.replace(good[name], **{field: wrong})
        records = good | {f"student {name}" if who == "student" else name: changed}
        if field == "output_weight_vH" and what == "a token more":
            continue  # padding
        signal = records["hidden" if name == "targets" else name]
        options = dict(config=config_of(top_k=4), vocab_size=6, group=None)
        with pytest.raises(ValueError, match=r"(?s)Expected .*found .*\. [A-Z]"):
            if name == "hidden" and who == "student":
                student = records["student hidden"]
                tropd_loss_from_hidden(
                    student.hidden_TH, student.output_weight_vH, good["targets"], good["top_k"],
                    **options,
                )  # fmt: skip
            else:
                logits = records["student logits"].logits_Tv
                tropd_loss(logits, records["targets"], signal, **options)


@pytest.mark.parametrize("signal", ["hidden", "top_k", "logits"])
@pytest.mark.parametrize("importance", ["none", "truncated", "band", "ppo"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_every_float_type_are_taken(dtype, importance, signal):
    """log-probs in float64 used to crash in the scatter of the gradient."""
    records = _all_records()
    changed = {
        key: value.to(dtype)
        for key, value in vars(records["targets"]).items()
        if value is not None and value.is_floating_point()
    }
    other = records | {"targets": dataclasses.replace(records["targets"], **changed)}
    given = records[signal]
    if signal == "top_k":
        given = dataclasses.replace(
            given,
            sampled_logprobs_T=given.sampled_logprobs_T.to(dtype),
            topk_logprobs_TK=given.topk_logprobs_TK.to(dtype),
        )
    for actual, expected in zip(
        _run(other, given, importance), _run(records, records[signal], importance), strict=True
    ):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_sampled_log_probs_in_a_column_make_no_square_loss():
    """[T, 1] used to broadcast against [T]."""
    good = _all_records()
    column = good["top_k"].sampled_logprobs_T.unsqueeze(-1)
    wrong = dataclasses.replace(good["top_k"], sampled_logprobs_T=column)
    with pytest.raises(ValueError, match=r"teacher\.sampled_logprobs_T \[T\] .*found .*\[3, 1\]"):
        _run(good, wrong)


def test_a_top_k_of_more_tokens_is_refused():
    good = _all_records()
    longer = {
        name: torch.cat([getattr(good["top_k"], name)] * 2)
        for name in ("topk_ids_TK", "topk_logprobs_TK")
    }
    with pytest.raises(ValueError, match=r"3 tokens everywhere.*teacher\.topk_ids_TK': 6"):
        _run(good, dataclasses.replace(good["top_k"], **longer))


def test_other_numbers_of_the_call_are_checked():
    student = torch.zeros(3, 6)
    for beta in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="beta must be at least 0 and finite"):
            _loss(student, LogitsSignal(student, 6), torch.arange(3), beta=beta)
    for size in (0, 6.0, True):
        with pytest.raises(ConfigError, match="vocab_size must be a whole number"):
            _loss(student, LogitsSignal(student, 6), torch.arange(3), vocab_size=size)


@pytest.mark.parametrize("bounds", [[0, 4, 2, 6], [1, 2, 3, 6], [0, 7, 6, 6]])
def test_columns_that_are_moved_ascend_from_0(bounds):
    class Three:
        """A group of three ranks, of which this is the first."""

        size, rank = staticmethod(lambda: 3), staticmethod(lambda: 0)

    good = [0, 2, 4, 6]
    for have, want in ((bounds, good), (good, bounds)):
        weight = torch.zeros(have[1] - have[0], 4)
        with pytest.raises(ValueError, match="ascending column ids that start at 0, found"):
            align_output_weight(weight, have=have, want=want, group=Three())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Values are not looked at, for a GPU would have to be waited for."""
    monkeypatch.setattr(tensors, "can_be_asked", lambda tensor: False)


IDS_OUTSIDE = (-100, -1, 10, 11, 2**40)
"""Of a vocabulary of 10 in 12 columns."""


@pytest.mark.parametrize("wrong", IDS_OUTSIDE)
def test_an_id_outside_the_vocabulary_is_an_error(wrong):
    logits, ids = torch.zeros(2, 12), torch.tensor([3, wrong])
    options = dict(config=config_of(top_k=4), vocab_size=10, group=None)
    signal, hidden = LogitsSignal(logits, 10), torch.zeros(2, 12)
    seen = {name: options[name] for name in ("config", "group")}
    topk = TopKSignal(torch.full((2,), -1.0), ids.repeat(4, 1).t(), torch.full((2, 4), -2.0))
    targets, good = _targets(ids), _targets(torch.tensor([3, 4]))
    for call in (
        lambda: tropd_loss(logits, targets, signal, **options),
        lambda: tropd_loss_from_hidden(hidden, torch.zeros(12, 12), targets, signal, **options),
        lambda: token_statistics(LogitsSignal(logits, 10), targets, signal, **seen),
        lambda: top_k_signal(logits, ids, 4, vocab_size=10, group=None),
        lambda: tropd_loss(logits, good, topk, **options),
    ):
        with pytest.raises(ValueError, match=rf"token ids in 0\.\.9 in .*{wrong}.*first at \[1"):
            call()


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("wrong", IDS_OUTSIDE)
def test_where_nothing_can_be_asked_an_id_outside_the_vocabulary_is_nan(name, wrong, as_on_a_gpu):
    """The log-prob of that token, and with it every loss that is made of it; no other token's."""
    student, teacher = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(8))
    ids = torch.tensor([3, wrong, 4])
    config = config_of(**_settings_of(name))
    known = dict(rollout_logprobs_T=torch.full((3,), -1.0))
    leaf = student.clone().requires_grad_()
    output = _loss(leaf, LogitsSignal(teacher, 10), ids, config=config, known=known, vocab_size=10)
    output.loss_T.sum().backward()
    expected = [False, True, False]
    for value in ("student_logprob", "teacher_logprob", "k1"):
        assert output.values[value].isnan().tolist() == expected
    sampled = config.needs.sampled
    assert output.loss_T.isnan().tolist() == (expected if sampled else [False] * 3)
    assert leaf.grad.isnan().any(-1).tolist() == (expected if sampled else [False] * 3)
    score = top_k_signal(teacher, ids, 4, vocab_size=10, group=None)
    assert score.sampled_logprobs_T.isnan().tolist() == expected


def test_where_nothing_can_be_asked_a_top_k_id_outside_the_vocabulary_is_nan(as_on_a_gpu):
    student = torch.randn(3, 12, generator=torch.Generator().manual_seed(8))
    ids = torch.tensor([[0, 1, 2], [0, 11, 2], [3, 4, 5]])
    signal = TopKSignal(torch.full((3,), -9.0), ids, torch.full((3, 3), -2.0))
    config = config_of(top_k=3)
    known = dict(uniforms_T=torch.full((3,), 0.999))
    output = _loss(student, signal, torch.arange(3), config=config, known=known, vocab_size=10)
    assert output.values["topk_mass_student"].isnan().tolist() == [False, True, False]
    assert output.values["outlier"].tolist() == [1, 1, 1]
    assert output.loss_T.isnan().tolist() == [False, True, False]


BAD_DRAWS = (1.0, math.nan, -0.25, math.inf)


@pytest.mark.parametrize("draw", BAD_DRAWS)
def test_a_draw_outside_its_interval(draw, monkeypatch):
    student, teacher = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(8))
    known = dict(uniforms_T=torch.tensor([0.2, draw, 0.4]))
    call = partial(_loss, student, LogitsSignal(teacher, 6), torch.arange(3), known=known)
    with pytest.raises(ValueError, match=r"draws in \[0, 1\) in targets\.uniforms_T.* at \[1\]"):
        call()
    for region in ("expected", "exact", "none"):  # not read
        assert call(config=config_of(region=region, top_k=4)).loss_T.isfinite().all()
    known["is_teacher_T"] = torch.tensor([False, True, False])
    assert call().loss_T.isfinite().all()
    del known["is_teacher_T"]
    monkeypatch.setattr(tensors, "can_be_asked", lambda tensor: False)
    output = call()
    assert output.loss_T.isnan().tolist() == [False, True, False]
    assert output.values["outlier"].isnan().tolist() == [False, True, False]


def test_a_draw_that_rounds_to_one_excludes_no_certain_token():
    student = torch.zeros(1, 6)
    known = dict(uniforms_T=torch.tensor([1 - 1e-12], dtype=torch.float64))
    output = _loss(student, LogitsSignal(student, 6), torch.tensor([2]), known=known)
    assert output.values["trust"].item() == 1 and output.values["outlier"].item() == 0


def test_probabilities_are_no_log_probs(monkeypatch):
    student = torch.zeros(2, 6)
    good, ids = torch.full((2,), -1.0), torch.arange(4).expand(2, 4)
    for signal in (
        TopKSignal(good.exp(), ids, torch.full((2, 4), -2.0)),
        TopKSignal(3 * good, ids, torch.full((2, 4), 0.1)),
    ):
        with pytest.raises(ValueError, match=r"log-probs in nats, not above 0 in teacher\."):
            _loss(student, signal, torch.arange(2))
        unread = _loss(student, signal, torch.arange(2), known=dict(weights_T=torch.zeros(2)))
        assert unread.loss_T.tolist() == [0, 0]
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "can_be_asked", lambda tensor: False)
            known = dict(uniforms_T=torch.full((2,), 0.999))
            assert _loss(student, signal, torch.arange(2), known=known).loss_T.isnan().all()


# ---- what the formulas say at their edges ----


@pytest.mark.parametrize("outlier", ["mask", "forward_kl"])
@pytest.mark.parametrize(("given", "trusted"), [("floor", True), ("tau", False)])
def test_a_reward_of_exactly_the_floor(given, trusted, outlier):
    """REOPOLD keeps R >= c, TrOPD's static test r > tau."""
    settings = dict(region="threshold", outlier=outlier, top_k=1) | {
        given: 0.2 if given == "floor" else -1.25
    }
    config = config_of(**settings)
    # One token that the student is sure of: log q = 0, so the ratio is the teacher's log-prob.
    student = torch.tensor([[0.0, -torch.inf]])
    floor = torch.tensor([config.reward_floor])
    signal = TopKSignal(floor, torch.zeros(1, 1).long(), floor.unsqueeze(-1))
    for shift, inside in ((0, trusted), (1, True), (-1, False)):
        at = floor if not shift else torch.nextafter(floor, floor + shift)
        moved = dataclasses.replace(signal, sampled_logprobs_T=at)
        output = _loss(student, moved, torch.tensor([0]), config=config)
        assert output.values["outlier"].item() == (not inside), shift


@pytest.mark.parametrize("importance", ["truncated", "band", "ppo"])
def test_importance_weighs_all_of_a_token(importance):
    """EOPD: K1 and the forward KL of an uncertain teacher, rho = 0.25, 0.75, 1 and 3."""
    student, teacher = 0.3 * torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(4))
    rho, ids = torch.tensor([0.25, 0.75, 1.0, 3.0]), torch.arange(4)
    log_q = student.log_softmax(-1)[torch.arange(4), ids]
    known = dict(rollout_logprobs_T=log_q - rho.log())
    settings = dict(region="none", entropy_forward_kl=0.1, top_k=4)
    runs = {}
    for name in ("none", importance):
        leaf = student.clone().requires_grad_()
        config = config_of(**settings, importance=name)
        output = _loss(leaf, LogitsSignal(teacher, 12), ids, config=config, known=known)
        output.loss_T.sum().backward()
        runs[name] = output.values["term"], leaf.grad, output.values["dropped"]
    (plain, gradient, _), (value, found, dropped) = runs["none"], runs[importance]
    if importance == "ppo":  # clips the reward alone
        assert not dropped.any() and found.abs().amax(-1).min() > 0
        return
    within = (rho >= 0.5) & (rho <= 2)
    factor = rho.clamp(max=2) if importance == "truncated" else torch.where(within, rho, 0)
    torch.testing.assert_close(value, factor * plain)
    torch.testing.assert_close(found, factor.unsqueeze(-1) * gradient)
    assert dropped.tolist() == (factor == 0).float().tolist()


def test_an_infinite_reward_of_the_caller_is_dropped_or_clipped():
    """Of each: the reward of a clipped outlier too, and a divergence stays."""
    student, teacher = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(6))
    known = dict(rewards_T=torch.tensor([torch.inf, -torch.inf]))
    for outlier, dropped in (("clip", [1, 1]), ("mask", [1, 1]), ("forward_kl", [0, 0])):
        leaf = student.clone().requires_grad_()
        config = config_of(region="expected", outlier=outlier, tau=-0.5, top_k=4)
        output = _loss(
            leaf, LogitsSignal(teacher - 3 * torch.eye(6)[:2], 6), torch.arange(2),
            config=config, known=known,
        )  # fmt: skip
        output.loss_T.sum().backward()
        assert output.values["dropped"].tolist() == dropped, outlier
        assert output.loss_T.isfinite().all() and leaf.grad.isfinite().all()
        for row, gone in enumerate(dropped):
            assert bool((leaf.grad[row] == 0).all()) == bool(gone)


@pytest.mark.parametrize("importance", ["truncated", "band", "ppo"])
@pytest.mark.parametrize("region", ["bernoulli", "expected", "threshold", "none"])
def test_a_rho_that_is_no_number_is_seen_in_the_loss(region, importance):
    student, teacher = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(8))
    known = dict(rollout_logprobs_T=torch.tensor([-1.0, math.nan, -1.0]))
    config = config_of(region=region, importance=importance, tau=-9.0, top_k=4)
    output = _loss(student, LogitsSignal(teacher, 6), torch.arange(3), config=config, known=known)
    assert output.loss_T.isnan().tolist() == [False, True, False]
