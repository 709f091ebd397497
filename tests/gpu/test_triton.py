"""The Triton kernels against float64 formulas and against plain torch, and what else needs a GPU.

Without a GPU ``unit_tests/test_dense_triton.py`` runs the same tests in Triton's interpreter
(``TRITON_INTERPRET=1``), on smaller blocks so that rows still have several.
"""

import os
from dataclasses import replace
from functools import partial
from importlib import import_module

import dense_reference as reference
import pytest
import torch

from megatron_tropd.losses import (
    PRESETS,
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    chunks,
    dense,
    preset,
    products,
    tropd_loss,
    tropd_loss_from_hidden,
)
from megatron_tropd.losses.dense import SUMS, DenseSpec, RowCoefficients, Scratch
from megatron_tropd.losses.passes import StatelessPasses, passes_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton")
dense_triton = import_module("megatron_tropd.losses.dense_triton")

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Odd, several pieces, the last one short.
COLUMNS = 301 if INTERPRETED else 40_003

pytestmark = [
    pytest.mark.gpu,
    # numpy, in the interpreter, of the infinities that the kernels mask afterwards.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
if not INTERPRETED:
    # Triton builds what launches its kernels.
    pytestmark.append(pytest.mark.needs("compiler"))
cuda_only = pytest.mark.skipif(INTERPRETED, reason="needs a GPU, not the interpreter")

PAIRS = ("ordinary", "excluded", "huge", "underflow")
SPECS = [
    DenseSpec(SUMS[:5]),
    DenseSpec(SUMS, "trust", reward_floor=-2.5, mix=0.7),
    DenseSpec(SUMS, "trust_clip", reward_floor=-2.5, mix=0.7),
    DenseSpec(SUMS, "log_ratio", reward_floor=-2.5, mix=0.7),
    DenseSpec(SUMS, "mixture", reward_floor=-2.5, mix=0.7),
    DenseSpec(SUMS, "mixture", reward_floor=-2.5, mix=0.2),
    DenseSpec(SUMS, "power", power=5.0, mix=0.2),
    DenseSpec(SUMS, "power", power=0.5, mix=0.7),
]
FEW_SUMS = [
    DenseSpec(),
    *(DenseSpec((name,)) for name in SUMS if name != "reward"),
    DenseSpec(("teacher_entropy", "tv")),
    DenseSpec(("teacher_to_mixture", "reward"), "mixture", mix=0.1),
    DenseSpec(("reward",), "log_ratio"),
    DenseSpec(("tv", "reward"), "trust"),
    DenseSpec(("reward", "tv"), "trust_clip", reward_floor=-1.0),
]
# The kernels see float32 either way.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
REWARDS = (None, "trust", "trust_clip", "log_ratio", "mixture", "power")


@pytest.fixture(autouse=True)
def _blocks_for_the_interpreter(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(dense_triton, "_BLOCK", 128)
        monkeypatch.setattr(dense_triton, "_PIECE", 256)


def _pair(kind, tokens=2, columns=COLUMNS):
    """Logits of both models, [T, v] each."""
    draw = torch.Generator().manual_seed(len(kind) + columns)
    pair = torch.randn(2, tokens, columns, generator=draw) * 2
    if kind == "excluded":
        pair[0, :, ::3], pair[1, :, ::5] = -torch.inf, -torch.inf
    elif kind == "huge":
        pair += 1e4
    elif kind == "underflow":  # of q, of p, of both in one column, and to subnormal numbers
        pair *= 60
        pair[..., :20] = pair.amax(-1, keepdim=True) - torch.linspace(86, 105, 20)[:columns]
    return pair.to(DEVICE).unbind(0)


def _factors(tokens):
    draw = torch.Generator().manual_seed(tokens)
    factors = torch.randn(3, tokens, generator=draw)
    factors[1, 0] = 0.0  # silences an infinite reward
    return factors.to(DEVICE).unbind(0)


def _scratch(logits):
    return Scratch(logits.shape[1], logits.device)


def _sums(passes, student, teacher, spec):
    norms = reference.normaliser(student), reference.normaliser(teacher)
    return passes.row_sums(student, teacher, *norms, spec, _scratch(student))


def _gradient(passes, student, teacher, factors, spec, out=None):
    norms = reference.normaliser(student), reference.normaliser(teacher)
    if not (spec.reward or spec.teacher):
        teacher, norms = None, (norms[0], None)
    out = torch.full_like(student, torch.nan) if out is None else out
    arguments = (student, teacher, *norms, RowCoefficients(*factors), spec, _scratch(student), out)
    passes.write_gradient(*arguments)
    return out


def _close(found, expected, *, rtol=5e-5, atol=1e-5):
    expected = expected.to(found.device, found.dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


# --- Largest logit and sum of exponentials -------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 256, 257, COLUMNS])
@pytest.mark.parametrize("kind", PAIRS)
def test_largest_and_sum(kind, columns):
    if kind == "excluded" and columns < 3:
        pytest.skip("nothing would be left")
    logits, _ = _pair(kind, 4, columns)
    found = dense_triton.max_and_sum_exp(logits, _scratch(logits))
    _close(found, dense.max_and_sum_exp(logits, _scratch(logits)), rtol=1e-5)
    largest, log_sum = reference.normaliser(logits).unbind(-1)
    assert torch.equal(found[:, 0], largest)
    _close(found[:, 1].log(), log_sum)


def test_largest_and_sum_of_rows_without_a_finite_logit():
    logits = torch.randn(6, COLUMNS, device=DEVICE)
    logits[0] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2, 3] = torch.nan
    logits[3, 130] = torch.inf
    logits[4, :129] = -torch.inf
    found = dense_triton.max_and_sum_exp(logits, _scratch(logits))
    _close(found, dense.max_and_sum_exp(logits, _scratch(logits)), rtol=1e-5)
    assert found[0].tolist() == [-torch.inf, 0.0]
    assert found[1].tolist() == [logits[1, 0].item(), 1.0]
    assert found[2].isnan().all() and found[3, 1].isnan()


# --- Row sums ------------------------------------------------------------------------------------


def _name(spec):
    return "-".join([spec.reward or "none", *spec.sums])


@pytest.mark.parametrize("spec", FEW_SUMS, ids=_name)
def test_some_row_sums(spec):
    test_row_sums(spec, "excluded")


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("spec", SPECS, ids=_name)
def test_row_sums(spec, kind):
    student, teacher = _pair(kind)
    found = _sums(dense_triton, student, teacher, spec)
    _close(found, reference.sums(student, teacher, spec))
    _close(found, _sums(dense, student, teacher, spec))


def test_row_sums_of_shards_add_up():
    """Normalisers are those of the whole vocabulary; a shard may have no finite logit."""
    student, teacher = _pair("ordinary")
    student[:, -60:], teacher[:, -60:] = -torch.inf, -torch.inf
    spec = DenseSpec(SUMS, "trust_clip", reward_floor=-1.0)
    norms = reference.normaliser(student), reference.normaliser(teacher)
    total = 0.0
    for shard in (slice(0, 100), slice(100, -60), slice(-60, None), slice(0, 0)):
        columns = student[:, shard], teacher[:, shard]
        total = total + dense_triton.row_sums(*columns, *norms, spec, _scratch(columns[0]))
    _close(total, reference.sums(student, teacher, spec))


@pytest.mark.parametrize("model", [0, 1])
def test_nan_spoils_its_own_row_and_no_other(model):
    pair = _pair("ordinary")
    pair[model][1, 200] = torch.nan
    for reward in REWARDS[1:]:
        spec = DenseSpec(SUMS, reward, reward_floor=-1.0, teacher=True)
        found = _sums(dense_triton, *pair, spec)
        expected = _sums(dense, *pair, spec)
        _close(found, expected)
        names = set(SUMS) - {("teacher_entropy", "student_entropy")[model]}
        assert all(found[1, SUMS.index(name)].isnan() for name in names)
        grad = _gradient(dense_triton, *pair, _factors(2), spec)
        assert grad[1].isnan().all() and grad[0].isfinite().all()


def test_nan_in_one_column_alone():
    """As if the normaliser had not noticed: every pointwise formula hands it on."""
    student, teacher = _pair("ordinary")
    norms = reference.normaliser(student), reference.normaliser(teacher)
    for model in range(2):
        spoiled = [student.clone(), teacher.clone()]
        spoiled[model][0, 5] = torch.nan
        for reward in REWARDS[1:]:
            spec = DenseSpec(("reward", "tv"), reward, reward_floor=-1.0)
            found = dense_triton.row_sums(*spoiled, *norms, spec, _scratch(student))
            assert found[0].isnan().all() and found[1:].isfinite().all()


# --- Gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("reward", REWARDS)
def test_gradient(reward, teacher_too, kind):
    student, teacher = _pair(kind)
    spec = DenseSpec((), reward, reward_floor=-1.5, mix=0.3, teacher=teacher_too)
    found = _gradient(dense_triton, student, teacher, _factors(2), spec)
    _close(found, reference.gradient(student, teacher, _factors(2), spec), atol=1e-6)
    _close(found, _gradient(dense, student, teacher, _factors(2), spec), atol=1e-6)
    in_place = student.clone()
    _gradient(dense_triton, in_place, teacher, _factors(2), spec, out=in_place)
    torch.testing.assert_close(in_place, found, rtol=0, atol=0, equal_nan=True)


def test_a_small_share_of_the_mixture_keeps_its_digits():
    """Of a sum that is as small as the share: relative to itself."""
    student, teacher = _pair("ordinary")
    factors = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE), _factors(2)[2]
    for mix in (1e-6, 1e-3, 0.999):
        spec = DenseSpec(("teacher_to_mixture",), "mixture", mix=mix)
        for module in (dense_triton, dense):
            found = _gradient(module, student, teacher, factors, spec).double()
            expected = reference.gradient(student, teacher, factors, spec).to(found.device)
            assert (found - expected).norm() < 1e-5 * expected.norm(), (mix, module)
            found = _sums(module, student, teacher, spec).double()
            expected = reference.sums(student, teacher, spec).to(found.device)
            assert (found - expected).norm() < 1e-5 * expected.norm(), (mix, module)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("teacher_too", [False, True])
@pytest.mark.parametrize("reward", REWARDS)
def test_a_row_of_zero_factors_is_zero_whatever_it_holds(reward, teacher_too, value):
    spec = DenseSpec((), reward, reward_floor=-1.5, mix=0.3, teacher=teacher_too)
    factors = [factor.clone() for factor in _factors(2)]
    for factor in factors:
        factor[1] = 0.0
    pair = _pair("ordinary")
    expected = reference.gradient(*pair, factors, spec)[0]
    for model in range(2):
        spoilt = [logits.clone() for logits in pair]
        spoilt[model][1] = value
        for module in (dense_triton, dense):
            found = _gradient(module, *spoilt, factors, spec)
            assert torch.all(found[1] == 0)
            _close(found[0], expected, atol=1e-6)


# --- Layouts -------------------------------------------------------------------------------------


def _cut_out(logits):
    """The same numbers in the middle of a larger buffer of nan."""
    tokens, columns = logits.shape
    buffer = torch.full((tokens + 2, columns + 7), torch.nan, device=logits.device)
    view = buffer[1:-1, 3:-4]
    view.copy_(logits)
    return buffer, view


def _transposed(logits):
    return logits.t().contiguous().t()


@pytest.mark.parametrize("columns", [97, COLUMNS])
def test_views_of_larger_buffers(columns):
    student, teacher = _pair("ordinary", 4, columns)
    spec = DenseSpec(SUMS, "trust_clip", reward_floor=-1.0, teacher=True)
    expected = (
        dense_triton.max_and_sum_exp(student, _scratch(student)),
        _sums(dense_triton, student, teacher, spec),
        _gradient(dense_triton, student, teacher, _factors(4), spec),
    )
    for lay_out in (lambda z: _cut_out(z)[1], _transposed, lambda z: z[:, :columns]):
        buffer, out = _cut_out(student)
        found = (
            dense_triton.max_and_sum_exp(lay_out(student), _scratch(student)),
            _sums(dense_triton, lay_out(student), lay_out(teacher), spec),
            _gradient(dense_triton, lay_out(student), lay_out(teacher), _factors(4), spec, out=out),
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        out.fill_(torch.nan)
        assert buffer.isnan().all(), "written outside of the view"


def test_one_row_expanded():
    student, teacher = (row[:1].expand(4, -1) for row in _pair("ordinary"))
    spec = DenseSpec(SUMS[:5])
    found = _sums(dense_triton, student, teacher, spec)
    _close(found, reference.sums(student, teacher, spec))
    assert torch.equal(found, found[:1].expand(4, -1))


def test_nothing_to_do():
    spec = DenseSpec(SUMS[:5], teacher=True)
    for tokens, columns in ((0, 9), (4, 0), (0, 0)):
        logits = torch.zeros(tokens, columns, device=DEVICE)
        norms = (torch.zeros(tokens, 2, device=DEVICE),) * 2
        stats = dense_triton.max_and_sum_exp(logits, _scratch(logits))
        assert stats.tolist() == [[-torch.inf, 0.0]] * tokens and stats.dtype == torch.float32
        sums = dense_triton.row_sums(logits, logits, *norms, spec, _scratch(logits))
        assert sums.tolist() == [[0.0] * 5] * tokens
        factors = RowCoefficients(*torch.zeros(3, tokens, device=DEVICE).unbind(0))
        dense_triton.write_gradient(logits, logits, *norms, factors, spec, _scratch(logits), logits)
    logits, _ = _pair("ordinary")
    assert _sums(dense_triton, logits, logits, DenseSpec()).shape == (2, 0)


def test_blocks_of_the_real_size(monkeypatch):
    monkeypatch.undo()
    columns = dense_triton._PIECE + dense_triton._BLOCK + 1
    student, teacher = _pair("ordinary", 2, columns)
    spec = DenseSpec(SUMS, "trust", teacher=True)
    found = dense_triton.max_and_sum_exp(student, _scratch(student))
    _close(found, dense.max_and_sum_exp(student, _scratch(student)), rtol=1e-5)
    _close(_sums(dense_triton, student, teacher, spec), reference.sums(student, teacher, spec))
    found = _gradient(dense_triton, student, teacher, _factors(2), spec)
    _close(found, reference.gradient(student, teacher, _factors(2), spec), atol=1e-6)


def test_the_same_bits_every_time():
    student, teacher = _pair("ordinary")
    spec = DenseSpec(SUMS, "mixture", mix=0.3, teacher=True)

    def run():
        stats = dense_triton.max_and_sum_exp(student, _scratch(student))
        sums = _sums(dense_triton, student, teacher, spec)
        return stats, sums, _gradient(dense_triton, student, teacher, _factors(2), spec)

    first = run()
    for _ in range(1 if INTERPRETED else 10):
        assert all(torch.equal(*both) for both in zip(run(), first, strict=True))


# --- The whole loss ------------------------------------------------------------------------------

CONFIGS = {name: preset(name) for name in PRESETS if not preset(name).needs.reference} | {
    "exact_clip": preset("tropd_exact", outlier="clip", tau=-1.0),
    "score_function": preset("tropd", gradient="score_function"),
}


def _inputs(dtype, tokens, vocab, width, hidden):
    """Hidden states and output layers of both models, and targets; the same on every call."""
    draw = torch.Generator().manual_seed(7)
    states = torch.randn(2, tokens, hidden, generator=draw)
    weights = torch.randn(2, width, hidden, generator=draw) / hidden**0.5 * 2
    ids = torch.randint(vocab, (tokens,), generator=draw)
    targets = LossTargets(
        ids_T=ids,
        is_teacher_T=torch.arange(tokens) % 5 == 0,
        uniforms_T=torch.rand(tokens, generator=draw),
        weights_T=torch.randint(3, (tokens,), generator=draw).float(),
        rollout_logprobs_T=-1 - 6 * torch.rand(tokens, generator=draw),
    )
    on_device = {k: v.to(DEVICE) for k, v in vars(targets).items() if v is not None}
    targets = replace(targets, **on_device)
    return states.to(DEVICE, dtype), weights.to(DEVICE, dtype), targets


def _use(monkeypatch, module):
    monkeypatch.setattr(chunks, "passes_for", partial(StatelessPasses, module))
    monkeypatch.setenv("TROPD_PLAIN", str(int(module is dense)))


def _from_hidden(config, dtype, *, tokens=10, vocab=90, width=96, hidden=16, memory_mib=None):
    states, weights, targets = _inputs(dtype, tokens, vocab, width, hidden)
    hidden_TH, weight_vH = states[0].requires_grad_(), weights[0].requires_grad_()
    output = tropd_loss_from_hidden(
        *(hidden_TH, weight_vH, targets, HiddenStatesSignal(states[1], weights[1], vocab)),
        **dict(config=config, vocab_size=vocab, group=None, beta=0.1, memory_mib=memory_mib),
    )
    grads = torch.autograd.grad(output.loss, [hidden_TH, weight_vH])
    return {"sum": output.loss.detach()} | output.values, grads


def _from_logits(config, dtype):
    states, weights, targets = _inputs(dtype, 10, 90, 96, 16)
    logits = (states @ weights.transpose(1, 2)).float()
    leaf = logits[0].requires_grad_()
    signal = LogitsSignal(logits[1].detach(), 90)
    settings = dict(config=config, vocab_size=90, group=None, beta=0.1)
    output = tropd_loss(leaf, targets, signal, **settings)
    return output.values, torch.autograd.grad(output.loss_T.sum(), [leaf])


def _compare(found, expected, *, rtol=1e-4, atol=1e-6):
    """Values and gradients of two runs; ``atol`` in units of the largest gradient."""
    (values, grads), (expected_values, expected_grads) = found, expected
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        _close(value, expected_values[name], rtol=1e-4)
    scale = max(grad.abs().max().item() for grad in expected_grads)
    for one, other in zip(grads, expected_grads, strict=True):
        _close(one, other, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_loss_equals_plain_torch(name, dtype, monkeypatch):
    runs = []
    for module in (dense_triton, dense):
        _use(monkeypatch, module)
        runs.append(_from_hidden(CONFIGS[name], dtype))
    # bfloat16: where rounding goes the other way, a last bit is a visible one.
    tolerance = {} if dtype == torch.float32 else dict(rtol=2e-2, atol=4e-3)
    _compare(*runs, **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_loss_of_a_row_without_weight(name, monkeypatch):
    """Hidden states that are nan at a token left out: the loss and both gradients stay finite."""
    _use(monkeypatch, dense_triton)
    original = _inputs

    def spoilt(model, *arguments):
        states, weights, targets = original(*arguments)
        left_out = targets.weights_T == 0
        assert 0 < int(left_out.sum()) < len(left_out)
        states[model][left_out] = torch.nan
        return states, weights, targets

    expected = _from_hidden(CONFIGS[name], torch.float32)
    for model in range(2):
        monkeypatch.setitem(globals(), "_inputs", partial(spoilt, model))
        found = _from_hidden(CONFIGS[name], torch.float32)
        for one, other in zip(found[1], expected[1], strict=True):
            _close(one, other, rtol=1e-4)
        _close(found[0]["loss"], expected[0]["loss"], rtol=1e-4)


@pytest.mark.parametrize("name", ["tropd", "exact_clip", "gkd_jsd", "gkd_forward_kl"])
def test_whole_loss_of_logits_equals_plain_torch(name, monkeypatch):
    runs = []
    for module in (dense_triton, dense):
        _use(monkeypatch, module)
        runs.append(_from_logits(CONFIGS[name], torch.float32))
    _compare(*runs)


@pytest.mark.parametrize("name", ["tropd", "tropd_exact", "opd"])
def test_the_gradient_of_bfloat16_is_rounded_once(name, monkeypatch):
    """Close to the teacher the columns' own part nearly cancels the dense one."""
    sizes = dict(tokens=12, vocab=290, width=300, hidden=16)
    states, weights, targets = _inputs(torch.bfloat16, **sizes)
    states[1] = states[0] + 0.02 * states[1]
    weights[:] = 4 * weights[0]
    targets = replace(targets, is_teacher_T=torch.zeros_like(targets.is_teacher_T))
    made = lambda *_: (states.clone(), weights.clone(), targets)  # noqa: E731
    monkeypatch.setattr(f"{__name__}._inputs", made)
    _use(monkeypatch, dense_triton)
    grads = []
    for dtype in (torch.bfloat16, None):
        monkeypatch.setattr(chunks, "gradient_dtype", lambda _, dtype=dtype: dtype)
        grads.append(_from_hidden(CONFIGS[name], torch.bfloat16, **sizes)[1])
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).float().norm() < 6e-3 * expected.float().norm()


# --- What only a GPU shows -----------------------------------------------------------------------


@cuda_only
def test_kernels_serve_cuda_tensors(monkeypatch):
    def module(device):
        logits = torch.zeros(1, 2, device=device)
        return getattr(passes_for(logits, None, DenseSpec(), _scratch(logits)), "_module", None)

    assert module("cuda") is dense_triton and module("cpu") is None
    monkeypatch.setenv("TROPD_PLAIN", "1")
    assert module("cuda") is dense


@cuda_only
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("name", ["tropd_exact_full", "exact_clip", "gkd_jsd"])
def test_whole_loss_equals_that_of_a_cpu(name, monkeypatch):
    size = dict(tokens=300, vocab=5_001, width=5_008)
    found = _from_hidden(CONFIGS[name], torch.float32, **size)
    monkeypatch.setitem(globals(), "DEVICE", torch.device("cpu"))
    expected = _from_hidden(CONFIGS[name], torch.float32, **size)
    _compare(found, expected, rtol=1e-3, atol=1e-4)


@cuda_only
def test_rows_of_a_real_vocabulary():
    student, teacher = _pair("ordinary", 5, 151_936)
    spec = DenseSpec(SUMS, "trust_clip", reward_floor=-2.0, teacher=True)
    _close(_sums(dense_triton, student, teacher, spec), reference.sums(student, teacher, spec))
    found = _gradient(dense_triton, student, teacher, _factors(5), spec)
    _close(found, reference.gradient(student, teacher, _factors(5), spec), atol=1e-6)


@cuda_only
def test_more_than_2_to_the_31_logits():
    columns = 2**16
    tokens = 2**31 // columns + 2
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.empty(tokens, columns, device=DEVICE)
    logits[-2:].normal_()
    last = logits[-2:].clone()
    norm = torch.zeros(tokens, 2, device=DEVICE)
    norm[-2:] = reference.normaliser(last)
    stats = dense_triton.max_and_sum_exp(logits, _scratch(last))
    _close(stats[-2:], dense.max_and_sum_exp(last, _scratch(last)))
    spec = DenseSpec(("student_entropy", "tv"), teacher=True)
    sums = dense_triton.row_sums(logits, logits, norm, norm, spec, _scratch(last))
    _close(sums[-2:], reference.sums(last, last, spec))
    factors = torch.ones(3, tokens, device=DEVICE).unbind(0)
    coefficients = RowCoefficients(*factors)
    dense_triton.write_gradient(
        logits, logits, norm, norm, coefficients, spec, _scratch(last), logits
    )
    expected = reference.gradient(last, last, [factor[-2:] for factor in factors], spec)
    _close(logits[-2:], expected, atol=1e-6)


@cuda_only
def test_tensors_on_another_than_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits = torch.randn(3, COLUMNS, device="cuda:1")
    found = dense_triton.max_and_sum_exp(logits, _scratch(logits))
    _close(found, dense.max_and_sum_exp(logits, _scratch(logits)))


@pytest.fixture
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def _peak_over(run):
    """Bytes that a call has allocated at most, beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@cuda_only
def test_kernels_allocate_nothing_of_the_size_of_the_logits():
    student, teacher = _pair("ordinary", 512, 151_936)
    norms = reference.normaliser(student), reference.normaliser(teacher)
    spec = DenseSpec(SUMS, "trust_clip", reward_floor=-2.0, teacher=True)
    factors, scratch = RowCoefficients(*_factors(512)), _scratch(student)

    def run():
        dense_triton.max_and_sum_exp(student, scratch)
        dense_triton.row_sums(student, teacher, *norms, spec, scratch)
        dense_triton.write_gradient(student, teacher, *norms, factors, spec, scratch, student)

    assert _peak_over(run) < 2**20  # of 297 MiB


@cuda_only
def test_peak_memory_of_the_loss_is_that_of_the_chunks():
    """A fixed budget; the weight's gradient twice, once as a product; and what T tokens need."""
    size = dict(vocab=32_000, width=32_000, hidden=256, memory_mib=256)
    peaks = []
    for tokens in (4096, 8192):
        run = partial(_from_hidden, CONFIGS["tropd"], torch.bfloat16, tokens=tokens, **size)
        run()  # so that the libraries have their workspaces
        peaks.append(_peak_over(run))
    weight = 4 * 32_000 * 256
    # Twice: the products want the gradient in bfloat16, topk wants room. Inputs are made inside.
    assert peaks[0] < 2 * 256 * 2**20 + 6 * weight
    assert peaks[1] - peaks[0] < 4 * 4096 * 32_000 / 10  # of the further logits of one model


# --- Products ------------------------------------------------------------------------------------


@cuda_only
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_accumulate_in_float32(dtype):
    draw = torch.Generator(device="cuda").manual_seed(1)
    hidden = torch.randn(130, 64, device="cuda", generator=draw).to(dtype)
    weight = torch.randn(301, 64, device="cuda", generator=draw).to(dtype)
    grad = torch.randn(130, 301, device="cuda", generator=draw)

    buffer = torch.full((2, 200, 301), torch.nan, device="cuda")
    products.write_logits(hidden, weight, buffer[1, :130])
    # Unrounded: as exact as float32 products of the same numbers.
    _close(buffer[1, :130], hidden.double() @ weight.double().t(), atol=1e-4)
    assert buffer[0].isnan().all() and buffer[1, 130:].isnan().all()

    kept = torch.promote_types(dtype, torch.float32)
    out = torch.full((200, 64), torch.nan, device="cuda", dtype=kept)
    products.write_hidden_grad(grad, weight, out[:130])
    exact = grad.to(dtype).double() @ weight.double()
    _close(out[:130].double(), exact, rtol=1e-5, atol=1e-3)
    assert out[130:].isnan().all()

    total = torch.ones(301, 64, device="cuda")
    for _ in range(2):
        products.add_weight_grad(grad, hidden, total, first=False)
    _close(total, 1 + 2 * (grad.to(dtype).double().t() @ hidden.double()), atol=1e-3)


@cuda_only
def test_products_of_gradients_smaller_than_float16():
    draw = torch.Generator(device="cuda").manual_seed(1)
    hidden, weight = (
        torch.randn(rows, 64, device="cuda", generator=draw).half() for rows in (130, 301)
    )
    grad = 1e-9 * torch.randn(130, 301, device="cuda", generator=draw)
    out = torch.empty(130, 64, device="cuda")
    products.write_hidden_grad(grad, weight, out)
    _close(1e9 * out.double(), 1e9 * grad.double() @ weight.double(), rtol=2e-3, atol=5e-2)
    total = torch.empty(301, 64, device="cuda")
    products.add_weight_grad(grad, hidden, total, first=True)
    _close(1e9 * total.double(), 1e9 * grad.double().t() @ hidden.double(), rtol=2e-3, atol=5e-2)


@cuda_only
@pytest.mark.parametrize("tokens, columns", [(0, 9), (4, 0)])
def test_products_of_nothing(tokens, columns):
    hidden = torch.zeros(tokens, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(columns, 8, device="cuda", dtype=torch.bfloat16)
    logits = torch.empty(tokens, columns, device="cuda")
    products.write_logits(hidden, weight, logits)
    out = torch.full_like(hidden, torch.nan)
    products.write_hidden_grad(logits, weight, out)
    assert not out.any()
    total = torch.ones(columns, 8, device="cuda")
    products.add_weight_grad(logits, hidden, total, first=False)
    assert bool((total == 1).all())
