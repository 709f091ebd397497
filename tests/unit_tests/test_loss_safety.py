"""What no caller can spoil: rows without weight, defaults of torch, tensors changed in place.

One rank, every published method, both entrances, both passes of a CPU. What is trained must not
depend on any of it, or an error has to say so.
"""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.distributed as dist
from loss_settings import FLAT, config_of

from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    TopKSignal,
    chunks,
    dense,
    products,
    required_signal,
    sharded_rows,
    tensors,
    top_k_signal,
    tropd_loss,
    tropd_loss_from_hidden,
    vocab_parallel,
)

NUM, VOCAB, HIDDEN = 9, 12, 8
BROKEN = 4
"""The row that the tests spoil."""
METHODS = {name: dict(settings) for name, settings in FLAT.items()}
METHODS |= {
    "expected clip": dict(region="expected", outlier="clip", tau=-0.5),
    "band": dict(region="none", importance="band", importance_low=1e-6, importance_high=1e6),
    "score function": dict(gradient="score_function"),
    "whole forward KL": dict(top_k=0),
}
ENTRANCES = ("logits", "hidden")
far = -math.inf


def _config(name):
    settings = METHODS[name]
    return config_of(**settings | {"top_k": min(settings.get("top_k", 64), 4)})


class Inputs:
    """A pair of models and tokens, each tensor a new one."""

    def __init__(self, *, dtype=torch.float32, hidden=HIDDEN, seed=3):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float32).to(dtype)

        self.hidden, self.weight = normal(NUM, hidden), normal(VOCAB, hidden)
        self.near, self.close = self.hidden + normal(NUM, hidden), self.weight + normal(VOCAB, 1)
        self.student, self.teacher = normal(NUM, VOCAB), normal(NUM, VOCAB)
        self.targets = LossTargets(
            ids_T=torch.randint(VOCAB, (NUM,), generator=draw),
            is_teacher_T=torch.arange(NUM, device="cpu") % 3 == 0,
            uniforms_T=torch.rand(NUM, generator=draw, dtype=torch.float32),
            weights_T=torch.rand(NUM, generator=draw, dtype=torch.float32) + 0.5,
            rollout_logprobs_T=-1 - torch.rand(NUM, generator=draw, dtype=torch.float32),
        )

    def run(self, entrance, config, *, spoil=lambda output: None, factor=1.0):
        """(loss, values, gradients): of logits, or of hidden states and weight."""
        common = dict(config=config, vocab_size=VOCAB, group=None, beta=0.3)
        if entrance == "logits":
            leaves = [self.student.clone().requires_grad_()]
            signal = LogitsSignal(self.teacher, VOCAB)
            output = tropd_loss(*leaves, self.targets, signal, **common)
            loss = output.loss_T.sum()
        else:
            leaves = [self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()]
            signal = HiddenStatesSignal(self.near, self.close, VOCAB)
            output = tropd_loss_from_hidden(*leaves, self.targets, signal, **common)
            loss = output.loss
        spoil(output)
        (loss * factor).backward()
        return loss.detach(), output.values, [leaf.grad for leaf in leaves]


@pytest.fixture(params=["in place", "plain"])
def _passes(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setenv("TROPD_PLAIN", "1")


every_method = pytest.mark.parametrize("name", METHODS)
both_entrances = pytest.mark.parametrize("entrance", ENTRANCES)


# ---- rows without weight ----


def _row(name, value):
    def change(inputs):
        getattr(inputs, name)[BROKEN] = value

    return change


def _token(name):
    def change(inputs):
        spoilt = getattr(inputs.targets, name).clone()
        spoilt[BROKEN] = math.nan
        inputs.targets = replace(inputs.targets, **{name: spoilt})

    return change


SPOILT = {
    "student nan": (_row("student", math.nan), _row("hidden", math.nan)),
    "student inf": (_row("student", math.inf), _row("hidden", math.inf)),
    "student -inf": (_row("student", far), _row("hidden", far)),
    "teacher nan": (_row("teacher", math.nan), _row("near", math.nan)),
    "teacher inf": (_row("teacher", math.inf), _row("near", math.inf)),
    "teacher -inf": (_row("teacher", far), _row("near", far)),
    "uniforms nan": (_token("uniforms_T"),) * 2,
    "rollout log-probs nan": (_token("rollout_logprobs_T"),) * 2,
}


@every_method
@both_entrances
@pytest.mark.usefixtures("_passes")
def test_a_row_without_weight_is_silent_whatever_it_holds(name, entrance):
    """Loss, weighted values and all gradients are those of the same batch without the fault."""
    for where in (BROKEN, BROKEN - 1):  # written by the student, by the teacher
        clean = Inputs()
        clean.targets.weights_T[BROKEN] = 0.0
        clean.targets.is_teacher_T[BROKEN] = where % 3 == 0
        expected = clean.run(entrance, _config(name))
        for fault, (of_logits, of_hidden) in SPOILT.items():
            spoilt = Inputs()
            spoilt.targets = clean.targets
            (of_logits if entrance == "logits" else of_hidden)(spoilt)
            loss, values, grads = spoilt.run(entrance, _config(name))
            torch.testing.assert_close(loss, expected[0], msg=fault)
            torch.testing.assert_close(values["loss"], expected[1]["loss"], msg=fault)
            assert values["loss"][BROKEN] == 0
            for found, good in zip(grads, expected[2], strict=True):
                torch.testing.assert_close(found, good, rtol=1e-5, atol=1e-6, msg=fault)
            assert torch.all(grads[0][BROKEN] == 0), fault


def _answers(ids, logprobs):
    """A teacher's answers: log p of the token, and the same few ids and log-probs for each."""
    rows = torch.tensor(ids).expand(NUM, -1), torch.tensor(logprobs).expand(NUM, -1)
    return TopKSignal(torch.full((NUM,), -6.0), *(part.clone() for part in rows))


@pytest.mark.parametrize("name", ["tropd", "tropd_expected", "opd", "local_support"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_row_without_weight_may_lack_a_label_and_an_answer(name, asked, monkeypatch):
    """Padding of labels (-100) and of answers, on a device that is asked and on one that is not."""
    monkeypatch.setattr(tensors, "can_be_asked", lambda tensor: asked)
    inputs = Inputs()
    inputs.targets.weights_T[BROKEN] = 0.0
    runs = []
    for spoilt in (False, True):
        signal = _answers([3, 1, 7, 0], [-1.0, -2.0, -3.0, -4.0])
        if spoilt:
            inputs.targets.ids_T[BROKEN] = -100
            signal.sampled_logprobs_T[BROKEN] = 1.0
            signal.topk_ids_TK[BROKEN], signal.topk_logprobs_TK[BROKEN] = VOCAB + 3, 1.0
        leaf = inputs.student.clone().requires_grad_()
        output = tropd_loss(
            leaf, inputs.targets, signal, config=_config(name), vocab_size=VOCAB, group=None
        )
        output.loss_T.sum().backward()
        runs.append((output.loss_T.detach(), leaf.grad))
    for found, good in zip(*runs, strict=True):
        assert torch.equal(found, good)


@pytest.mark.parametrize("name", ["tropd", "tropd_expected", "local_support"])
def test_an_id_that_an_answer_names_twice(name, monkeypatch):
    """A short answer padded with an id of it: both parts reach a gradient in bfloat16, too."""
    inputs = Inputs(dtype=torch.bfloat16)
    signal = _answers([3, 1, 7, 3], [-1.0, -2.0, -3.0, -4.0])
    monkeypatch.setenv("TROPD_PLAIN", "1")
    grads = []
    for dtype in (torch.bfloat16, None):
        monkeypatch.setattr(chunks, "gradient_dtype", lambda pair, dtype=dtype: dtype)
        leaves = [inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
        output = tropd_loss_from_hidden(
            *leaves, inputs.targets, signal, config=_config(name), vocab_size=VOCAB, group=None
        )
        grads.append(torch.autograd.grad(output.loss, leaves))
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).float().norm() < 0.02 * expected.float().norm()


@every_method
def test_a_row_that_the_caller_leaves_out_is_silent(name):
    """The factor 0 comes after the loss: from a mask, or an index."""
    inputs = Inputs()
    inputs.student[BROKEN] = math.nan
    leaf = inputs.student.requires_grad_()
    output = tropd_loss(
        leaf, inputs.targets, LogitsSignal(inputs.teacher, VOCAB),
        config=_config(name), vocab_size=VOCAB, group=None,
    )  # fmt: skip
    kept = torch.arange(NUM) != BROKEN
    output.loss_T[kept].sum().backward()
    assert torch.all(leaf.grad[BROKEN] == 0) and leaf.grad.isfinite().all()


def test_a_row_with_any_factor_is_not_silenced():
    """One of the three is enough, of either sign, and nan is no 0."""
    factors = torch.zeros(3, 8)
    for row in range(3):
        factors[row, row], factors[row, row + 3] = 0.5, -0.5
    factors[1, 6] = math.nan
    out = torch.ones(8, 2)
    dense.RowCoefficients(*factors).silence(out)
    assert out[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0] and torch.equal(out[:, 0], out[:, 1])


@every_method
@both_entrances
@pytest.mark.usefixtures("_passes")
def test_a_broken_row_with_weight_is_seen(name, entrance):
    for fault in ("student nan", "teacher nan"):
        inputs = Inputs()
        inputs.targets = replace(inputs.targets, is_teacher_T=torch.zeros(NUM, dtype=torch.bool))
        SPOILT[fault][entrance == "hidden"](inputs)
        loss, values, _grads = inputs.run(entrance, _config(name))
        assert loss.isnan() and values["loss"].isnan().nonzero().tolist() == [[BROKEN]], fault


# ---- defaults of torch ----


def _same(found, expected):
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            one, other = list(one.values()), list(other.values())
        if isinstance(one, list):
            _same(one, other)
        else:
            assert one.dtype == other.dtype and torch.equal(one, other)


@both_entrances
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default, entrance):
    """Every buffer says what it is made of; to the bit."""
    for name in METHODS:
        config, expected = _config(name), Inputs().run(entrance, _config(name))
        try:
            torch.set_default_dtype(default)
            found = Inputs().run(entrance, config)
        finally:
            torch.set_default_dtype(torch.float32)
        _same(found, expected)


@both_entrances
@pytest.mark.usefixtures("_passes")
def test_the_default_device_changes_nothing(entrance):
    """Every buffer lies where the logits do. On "meta" nothing could be computed."""
    for name in METHODS:
        config, inputs = _config(name), Inputs()
        expected = inputs.run(entrance, config)
        with torch.device("meta"):
            found = inputs.run(entrance, config)
        _same(found, expected)


def test_the_default_dtype_changes_no_signal():
    inputs = Inputs()
    signals = []
    for default in (torch.float32, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            ids = inputs.targets.ids_T
            signals.append(top_k_signal(inputs.teacher, ids, 3, vocab_size=VOCAB, group=None))
        finally:
            torch.set_default_dtype(torch.float32)
    one, other = (
        [s.sampled_logprobs_T, s.topk_ids_TK.double(), s.topk_logprobs_TK] for s in signals
    )
    _same(one, other)


# ---- changed in place ----


@every_method
@both_entrances
@pytest.mark.usefixtures("_passes")
def test_reported_values_are_the_callers(name, entrance):
    """Whatever is done to them, one by one, before the gradient is made."""

    def overwrite(output):
        for key, value_T in output.values.items():
            others = {k: v.clone() for k, v in output.values.items() if k != key}
            value_T.fill_(7.0)
            for other, before in others.items():
                assert torch.equal(output.values[other], before), f"{other} is part of {key}"

    config, inputs = _config(name), Inputs()
    expected = inputs.run(entrance, config)
    found = inputs.run(entrance, config, spoil=overwrite)
    _same(found[2], expected[2])


CHANGED = {
    "the student's logits": lambda inputs, leaf: leaf.detach().mul_(2),
    "the teacher's logits": lambda inputs, leaf: inputs.teacher.mul_(2),
    "the teacher's hidden states": lambda inputs, leaf: inputs.near.mul_(2),
    "the teacher's output layer": lambda inputs, leaf: inputs.close.mul_(2),
    "the tokens": lambda inputs, leaf: inputs.targets.ids_T.fill_(0),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_change_between_forward_and_backward_is_refused(what):
    """Of everything that the gradient reads again."""
    inputs = Inputs()
    leaf = inputs.student.clone().requires_grad_()
    if "hidden" in what or "layer" in what:
        signal = HiddenStatesSignal(inputs.near, inputs.close, VOCAB)
    else:
        signal = LogitsSignal(inputs.teacher, VOCAB)
    config = config_of(region="exact", top_k=4)
    output = tropd_loss(leaf, inputs.targets, signal, config=config, vocab_size=VOCAB, group=None)
    CHANGED[what](inputs, leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss_T.sum().backward()


@pytest.mark.parametrize("name", ["tropd_exact", "tropd", "gkd_jsd"])
def test_changes_that_the_gradient_does_not_read(name):
    """Weights, draws and log-probs are used in the forward pass; from hidden states all is."""
    config = _config(name)

    def change(inputs):
        targets = inputs.targets
        for tensor in (targets.weights_T, targets.uniforms_T, targets.rollout_logprobs_T):
            tensor.zero_()
        targets.is_teacher_T.fill_(True)

    if "full" not in required_signal(config):
        signal = top_k_signal(
            Inputs().teacher, Inputs().targets.ids_T, K, vocab_size=VOCAB, group=None
        )
        leaf, common = Inputs().student.requires_grad_(), dict(vocab_size=VOCAB, group=None)
        output = tropd_loss(leaf, Inputs().targets, signal, config=config, beta=0.3, **common)
        signal.topk_ids_TK.zero_(), signal.topk_logprobs_TK.zero_()
        output.loss_T.sum().backward()
        torch.testing.assert_close(leaf.grad, Inputs().run("logits", config)[2][0])

    expected = Inputs().run("logits", config)
    inputs = Inputs()
    _same(inputs.run("logits", config, spoil=lambda _: change(inputs))[2], expected[2])

    def change_all(inputs):
        change(inputs)
        for tensor in (inputs.near, inputs.close, inputs.targets.ids_T):
            tensor.zero_()

    expected, inputs = Inputs().run("hidden", config), Inputs()
    _same(inputs.run("hidden", config, spoil=lambda _: change_all(inputs))[2], expected[2])


# ---- derivatives ----


@both_entrances
@pytest.mark.parametrize("upstream", [False, True])
def test_a_second_derivative_is_refused(entrance, upstream):
    """Also where the incoming gradient is a constant, where torch's own mark keeps silent."""
    inputs, config = Inputs(), config_of(top_k=4)
    common = dict(config=config, vocab_size=VOCAB, group=None)
    if entrance == "logits":
        leaf, signal = inputs.student.requires_grad_(), LogitsSignal(inputs.teacher, VOCAB)
        loss = tropd_loss(leaf, inputs.targets, signal, **common).loss_T.sum()
    else:
        leaf = inputs.hidden.requires_grad_()
        signal = HiddenStatesSignal(inputs.near, inputs.close, VOCAB)
        loss = tropd_loss_from_hidden(leaf, inputs.weight, inputs.targets, signal, **common).loss
    scale = torch.ones((), requires_grad=upstream)
    (grad,) = torch.autograd.grad(loss * scale, [leaf], create_graph=True)
    penalty = grad.square().sum() + leaf.sum()
    with pytest.raises(RuntimeError, match="second"):
        penalty.backward()


@pytest.mark.parametrize("function", ["_SumGradient", "_GatherRows"])
def test_a_second_derivative_through_the_rows_is_refused(function, monkeypatch):
    group = SimpleNamespace(size=lambda: 1)
    copy = lambda out, given, group: out.copy_(given)  # noqa: E731
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(dist, "all_gather_into_tensor", copy)
    monkeypatch.setattr(dist, "reduce_scatter_tensor", copy)
    leaf = torch.ones(2, 3, requires_grad=True)
    rows = getattr(sharded_rows, function).apply(leaf, group)
    (grad,) = torch.autograd.grad(rows.square().sum(), [leaf], create_graph=True)
    assert torch.equal(grad, torch.full((2, 3), 2.0))
    with pytest.raises(RuntimeError, match="second"):
        grad.sum().backward()


# ---- digits ----


@both_entrances
@pytest.mark.usefixtures("_passes")
@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.3, 0.5, 0.7, 0.999])
def test_jsd_keeps_its_digits(beta, entrance):
    inputs = Inputs()
    found = inputs.run(entrance, config_of(objective="jsd", jsd_beta=beta, teacher_tokens="same"))
    student, teacher = inputs.student, inputs.teacher
    if entrance == "hidden":
        student, teacher = (
            h.double() @ w.double().t()
            for h, w in ((inputs.hidden, inputs.weight), (inputs.near, inputs.close))
        )
    t = inputs.targets
    tokens = reference.Tokens(t.ids_T, t.is_teacher_T, t.uniforms_T, t.weights_T)
    settings = dict(objective="jsd", jsd_beta=beta, teacher_tokens="same")
    expected = reference.answer(student, teacher, tokens, settings, beta=0.3)
    grad, value = expected.gradient_TV, expected.values["loss"]
    good = [grad]
    if entrance == "hidden":
        good = [grad @ inputs.weight.double(), grad.t() @ inputs.hidden.double()]
    for one, other in zip([found[1]["loss"], *found[2]], [value, *good], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hidden_gradients_are_rounded_once(dtype):
    """After a loss scale's factor: of gradients that float16 cannot hold before it."""
    inputs, config = Inputs(dtype=dtype), config_of(objective="reverse_kl")
    inputs.targets = replace(inputs.targets, weights_T=torch.full((NUM,), 2.0**-26))
    *_, found = inputs.run("hidden", config, factor=2.0**26)
    inputs.targets = replace(inputs.targets, weights_T=None)
    *_, expected = inputs.run("hidden", config)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-4)
        assert float(other.abs().max()) > 0.1


def test_a_gradient_is_fitted_to_float16():
    """As a GPU's products take it: rows of any size, whatever another row holds."""
    grad = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    grad *= torch.tensor([1e-12, 1e-6, 1.0, 1e6, 0.0, 1.0]).unsqueeze(-1)
    grad[5, 3] = math.nan
    fitted, exponent = products._fit(grad, torch.float16)
    assert fitted.dtype == torch.float16 and fitted[:5].isfinite().all()
    found = torch.ldexp(fitted.float(), exponent)
    torch.testing.assert_close(found, grad, rtol=2**-10, atol=0, equal_nan=True)
    fitted, exponent = products._fit(grad, torch.float16, together=True)
    found = torch.ldexp(fitted.float(), exponent)
    assert exponent.shape == (1, 1)
    torch.testing.assert_close(found[2:], grad[2:], rtol=2**-10, atol=1e-4, equal_nan=True)
    for other in (torch.bfloat16, torch.float32):
        fitted, exponent = products._fit(grad, other)
        assert exponent is None and fitted.dtype == other


@pytest.mark.usefixtures("_passes")
def test_float64_hidden_states():
    """Logits are float32 here as everywhere; products and gradients have the dtype that went in."""
    for name in METHODS:
        _loss, _values, expected = Inputs().run("hidden", _config(name))
        *_, found = Inputs(dtype=torch.float64).run("hidden", _config(name))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one.float(), other, rtol=1e-4, atol=1e-5)


# ---- what travels ----

K = 4
WORDS = {
    "opd": (3 * 0 + 6, 0, 0, 0),
    "tropd": (3 * K + 6, 0, 0, 0),
    "tropd_expected": (3 * K + 6, 0, 0, 0),
    "tropd_mask": (6, 0, 0, 0),
    "local_support": (3 * K + 6, 0, 0, 0),
    "trb": (3 * K + 6, 0, 0, 0),
    "gkd_forward_kl": (6, 1, 0, 1),
    "gkd_reverse_kl": (6, 1, 0, 1),
    "eopd": (3 * K + 6, 1, 0, 1),
    "whole forward KL": (6, 1, 0, 1),
    "tropd_exact": (3 * K + 6, 0, 2, 2),
    "tropd_exact_full": (6, 1, 2, 3),
    "gkd_jsd": (6, 0, 2, 2),
}
"""Words of a token, the table of docs/losses.md: all-gather of all passes, what a CPU's add to it,
all-reduce of a CPU, of a GPU."""


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("metrics", [False, True])
def test_words_that_travel_are_those_of_the_table(plain, metrics, monkeypatch):
    """Plain torch has the passes of a GPU."""
    if plain:
        monkeypatch.setenv("TROPD_PLAIN", "1")
    sent = {}

    def recorded(name):
        original = getattr(vocab_parallel, name)

        def start(values, *, group):
            sent[name] = sent.get(name, 0) + values.shape[-1]
            return original(values, group=group)

        monkeypatch.setattr(vocab_parallel, name, start)

    recorded("AllGather"), recorded("AllReduceSum")
    inputs = Inputs()
    for name, (gathered, more, cpu, gpu) in WORDS.items():
        sent.clear()
        tropd_loss(
            inputs.student, inputs.targets, LogitsSignal(inputs.teacher, VOCAB),
            config=_config(name), vocab_size=VOCAB, group=None, metrics=metrics,
        )  # fmt: skip
        if not metrics:
            expected = (gathered, gpu) if plain else (gathered + more, cpu)
            assert (sent["AllGather"], sent["AllReduceSum"]) == expected, name
            continue
        k = K if _config(name).needs.top_k else VOCAB
        assert sent["AllGather"] == 3 * k + (6 if plain else 10), name
        assert sent["AllReduceSum"] in ((5, 6, 7) if plain else (1, 2, 3)), name


# ---- ties of the top-k ----


def _tied_rows(columns):
    """Rows of bfloat16 numbers, of few values, all equal, mostly excluded, all but the last
    excluded; of both zeros.
    """
    rows = torch.randn(24, columns, generator=torch.Generator().manual_seed(columns)) * 3
    rows[:8] = rows[:8].bfloat16().float()
    rows[8:16] = rows[8:16].round()
    rows[16:18] = 1.0
    rows[18:20, columns // 3 :] = -torch.inf
    rows[20:22] = -torch.inf
    rows[21, -1] = 1.0
    rows[22:, ::2] = 0.0
    rows[22:, 1::2] = -0.0
    return rows


@pytest.mark.parametrize("columns", [2, 37, 500, 4001])
def test_ties_go_to_the_lower_id_however_the_columns_are_cut(columns):
    rows = _tied_rows(columns)
    for k in {1, 2, min(7, columns), min(64, columns), columns - 1, columns}:
        expected = reference.top_k_ids(rows, k)
        for cuts in ([], [columns // 2], [1, 1, columns - 1]):
            bounds = [0, *cuts, columns]
            keys = torch.stack([
                vocab_parallel.pack_top_k(rows[:, begin:end], k, start=begin)
                for begin, end in pairwise(bounds)
            ])  # fmt: skip
            merged, _ = vocab_parallel.merge_top_k(keys, keys)
            logits, ids = vocab_parallel.unpack_top_k(merged)
            assert torch.equal(ids, expected)
            assert torch.equal(logits, rows.gather(-1, ids))


def test_ties_cost_no_sort_of_the_vocabulary(monkeypatch):
    """Whatever is sorted has few entries beside a vocabulary, however many are equal."""
    widths = []

    def watched(original):
        def call(tensor, *args, **kwargs):
            widths.append(tensor.shape[-1])
            return original(tensor, *args, **kwargs)

        return call

    for name in ("sort", "topk"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    vocab_parallel.pack_top_k(torch.ones(2, 50_257), 64, start=0)
    assert widths and max(widths) <= 32 * 64
