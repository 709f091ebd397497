"""What follows from the definition of the loss, and what its callers may rely on; one rank."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.config import LossConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    TopKSignal,
    check_signal,
    keyed_uniform,
    required_signal,
    top_k_signal,
    tropd_loss,
)
from megatron_tropd.losses.statistics import chunk_rows


def _loss(student, signal, ids, *, is_teacher=None, uniforms=None, config=None, **settings):
    num = len(ids)
    targets = LossTargets(
        ids,
        torch.zeros(num, dtype=torch.bool) if is_teacher is None else is_teacher,
        torch.zeros(num) if uniforms is None else uniforms,
    )
    settings = dict(beta=0.001, vocab_size=student.shape[-1], group=None) | settings
    return tropd_loss(student, targets, signal, config=config or LossConfig(top_k=4), **settings)


def _sampled_from_student(num=40_000, vocab=12):
    """One pair of distributions at every position, tokens drawn from the student's."""
    draw = torch.Generator().manual_seed(11)
    q_logits, p_logits = torch.randn(2, vocab, generator=draw) * 1.5
    ids = torch.multinomial(q_logits.softmax(0), num, replacement=True, generator=draw)
    uniforms = torch.from_numpy(keyed_uniform(5, 6, 7, range(num)))
    return q_logits, p_logits, ids, uniforms


def _within(samples, expected, deviations=5.0):
    error = samples.double().std() / len(samples) ** 0.5
    assert abs(float(samples.double().mean()) - expected) < deviations * float(error)


def test_mean_of_sampled_outlier_is_total_variation():
    q_logits, p_logits, ids, uniforms = _sampled_from_student()
    p, q = p_logits.double().softmax(0), q_logits.double().softmax(0)
    tv = 1 - float(torch.minimum(p, q).sum())
    assert 0.2 < tv < 0.8
    values = _loss(
        q_logits.expand(len(ids), -1),
        LogitsSignal(p_logits.expand(len(ids), -1), 12),
        ids,
        uniforms=uniforms,
    ).values
    torch.testing.assert_close(values["tv"], torch.full((len(ids),), tv), rtol=1e-5, atol=1e-6)
    _within(values["outlier"], tv)
    _within(1 - values["trust"], tv)
    _within(values["k1"], float((q * (q.log() - p.log())).sum()))


def test_mean_of_terms_and_gradients_is_the_exact_loss():
    """Over x ~ q and the draw: trust term - sum min(p,q) log p/q, outliers TV x top-k KL."""
    q_logits, p_logits, ids, uniforms = _sampled_from_student()
    p, q = p_logits.double().softmax(0), q_logits.double().softmax(0)
    overlap, log_ratio = torch.minimum(p, q), p.log() - q.log()
    tv = 1 - overlap.sum()
    top = p.topk(4).indices
    top_p = torch.zeros_like(p).index_copy(0, top, p[top])
    value = -(overlap * log_ratio).sum() + tv * (top_p * log_ratio).sum()
    # d log q(v) / dz = 1[v] - q, weighted by what multiplies log q(v) in expectation.
    weights = -overlap * log_ratio - tv * top_p
    gradient = weights - weights.sum() * q

    logits = q_logits.repeat(len(ids), 1).requires_grad_()
    signal = LogitsSignal(p_logits.expand(len(ids), -1), 12)
    output = _loss(logits, signal, ids, uniforms=uniforms)
    output.loss_T.sum().backward()
    _within(output.values["term"], float(value))
    for column, expected in zip(logits.grad.unbind(-1), gradient.tolist(), strict=True):
        _within(column, expected)


def test_equal_models_have_no_outlier_and_no_gradient():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = torch.arange(50) % 12
    uniforms = torch.full((50,), 1 - 2.0**-24)
    output = _loss(logits, LogitsSignal(logits.detach(), 12), ids, uniforms=uniforms)
    output.loss_T.sum().backward()
    assert torch.all(output.values["trust"] == 1) and torch.all(output.values["outlier"] == 0)
    assert torch.all(logits.grad == 0) and torch.all(output.loss_T == 0)


def test_token_the_teacher_never_writes_is_an_outlier():
    teacher = torch.zeros(1, 6)
    teacher[0, 2] = -torch.inf
    for outlier in ("forward_kl", "mask", "clip"):
        logits = torch.zeros(1, 6).requires_grad_()
        config = LossConfig(outlier=outlier, top_k=4, tau=-2.0)
        output = _loss(logits, LogitsSignal(teacher, 6), torch.tensor([2]), config=config)
        output.loss_T.sum().backward()
        assert output.values["outlier"].item() == 1 and output.values["trust"].item() == 0
        assert output.loss_T.isfinite().all() and logits.grad.isfinite().all()


def test_gradient_step_lowers_what_each_term_says():
    """Down the gradient, the teacher's token and the teacher's top-k become more likely."""
    draw = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 1, 12, generator=draw)
    rare = (student.log_softmax(-1) - teacher.log_softmax(-1)).argmax(-1)
    for is_teacher in (True, False):
        logits = student.clone().requires_grad_()
        settings = dict(is_teacher=torch.tensor([is_teacher]), uniforms=torch.tensor([0.999]))
        signal = LogitsSignal(teacher, 12)
        output = _loss(logits, signal, rare, beta=1.0, **settings)
        output.loss_T.sum().backward()
        after = _loss(student - 0.1 * logits.grad, signal, rare, beta=1.0, **settings)
        assert after.loss_T.item() < output.loss_T.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_top_k_signals_agree_with_logits(dtype):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, 8, generator=draw).to(dtype)
    weight = torch.randn(16, 8, generator=draw).to(dtype)
    student, ids = torch.randn(20, 16, generator=draw), torch.randint(13, (20,), generator=draw)
    uniforms, logits = torch.rand(20, generator=draw), hidden @ weight.t()
    signals = [
        LogitsSignal(logits, 13),
        HiddenStatesSignal(hidden, weight, 13),
        top_k_signal(logits, ids, 6, vocab_size=13, group=None),
    ]
    runs = []
    for signal in signals:
        leaf = student.clone().requires_grad_()
        settings = dict(uniforms=uniforms, vocab_size=13, chunk=7)
        output = _loss(leaf, signal, ids, **settings)
        output.loss_T.sum().backward()
        runs.append((output.loss_T.detach(), leaf.grad))
    for loss, grad in runs[1:]:
        torch.testing.assert_close(loss, runs[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, runs[0][1], rtol=1e-5, atol=1e-6)


def test_teacher_padded_wider_than_the_student_on_one_rank():
    draw = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(5, 10, generator=draw), torch.randn(5, 14, generator=draw)
    ids = torch.arange(5)
    wide = _loss(student, LogitsSignal(teacher, 9), ids, vocab_size=9)
    narrow = _loss(student[:, :9], LogitsSignal(teacher[:, :9], 9), ids, vocab_size=9)
    assert torch.equal(wide.loss_T, narrow.loss_T)


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


def test_temporaries_are_bounded_by_the_chunk():
    """Forward makes nothing of [T, v]; the largest tensor is the int64 keys of one chunk."""
    tokens, vocab, hidden, chunk = 256, 512, 4, 8
    student = torch.randn(tokens, vocab).to(torch.bfloat16).requires_grad_()
    signal = HiddenStatesSignal(torch.randn(tokens, hidden), torch.randn(vocab, hidden), vocab)
    ids = torch.zeros(tokens, dtype=torch.long)
    with _LargestTensor() as largest:
        output = _loss(student, signal, ids, chunk=chunk)
    assert largest.bytes <= chunk * vocab * 8
    with _LargestTensor() as largest:
        output.loss_T.sum().backward()
    assert largest.bytes == tokens * vocab * 2  # the gradient itself


def test_default_chunk_keeps_temporaries_at_64_mib():
    for width in (1, 300, 152_064, 10**9):
        rows = chunk_rows(width)
        assert rows >= 1 and (rows == 1 or rows * width * 40 <= 64 * 2**20)
    assert chunk_rows(300, 5) == 5
    with pytest.raises(ValueError, match="at least 1 row, found 0"):
        chunk_rows(300, 0)


def test_value_of_a_known_token():
    """q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4), x = 0: m = 1/2, log p/q = -log 2."""
    student = torch.tensor([[2.0, 1.0, 1.0]]).log()
    teacher = torch.tensor([[1.0, 2.0, 1.0]]).log()

    def run(u, **settings):
        return _loss(
            student.clone(),
            LogitsSignal(teacher, 3),
            torch.tensor([0]),
            uniforms=torch.tensor([u]),
            **settings,
        )

    inside = run(0.49, config=LossConfig(top_k=2))
    assert inside.values["trust"].item() == pytest.approx(0.5)
    assert inside.values["outlier"].item() == 0
    assert inside.loss_T.item() == pytest.approx(math.log(2))
    outside = run(0.51, config=LossConfig(top_k=2))
    assert outside.values["outlier"].item() == 1
    # top-2 of p, ties to the lower id: tokens 1 and 0.
    assert outside.loss_T.item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert outside.values["topk_mass_teacher"].item() == pytest.approx(0.75)
    assert outside.values["tv"].item() == pytest.approx(0.25)
    clipped = run(0.51, config=LossConfig(outlier="clip", tau=-0.5, top_k=2))
    assert clipped.loss_T.item() == pytest.approx(0.5)
    weighted = run(0.49, config=LossConfig(top_k=2), segment_weights=(5.0, 2.0))
    assert weighted.loss_T.item() == pytest.approx(2 * math.log(2))
    assert weighted.values["term"].item() == pytest.approx(math.log(2))


def test_required_signal():
    assert required_signal(LossConfig()) == {"sampled", "top_k"}
    assert required_signal(LossConfig(region="none")) == {"sampled"}
    assert required_signal(LossConfig(outlier="mask")) == {"sampled"}


class _SampledOnly:
    provides = frozenset({"sampled"})
    num_tokens = 0


def test_signal_mismatch_names_both():
    check_signal(LossConfig(region="none"), _SampledOnly, vocab_size=100)
    with pytest.raises(ConfigError) as caught:
        check_signal(LossConfig(), _SampledOnly, vocab_size=100)
    for part in ("bernoulli", "forward_kl", "top_k", "_SampledOnly", "sampled"):
        assert part in str(caught.value)


def test_top_k_larger_than_the_vocabulary():
    with pytest.raises(ConfigError, match=r"vocabulary of 40 tokens, found 64"):
        check_signal(LossConfig(), HiddenStatesSignal, vocab_size=40)
    check_signal(LossConfig(top_k=40), HiddenStatesSignal, vocab_size=40)
    # A loss without a top-k reports the mass of what there is.
    student = torch.zeros(1, 6)
    config = LossConfig(region="none")
    output = _loss(student, LogitsSignal(student, 6), torch.tensor([2]), config=config)
    assert output.values["topk_mass_teacher"].item() == pytest.approx(1.0)


def test_inputs_that_do_not_fit_together():
    student, ids = torch.zeros(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"found \{'the teacher signal': 2\}"):
        _loss(student, LogitsSignal(student[:2], 6), ids)
    with pytest.raises(ValueError, match=r"token ids in 0\.\.5, found 0\.\.6"):
        _loss(student, LogitsSignal(student, 6), torch.tensor([0, 1, 6]))
    with pytest.raises(ConfigError, match="vocabulary of 6 tokens, found 5"):
        _loss(student, LogitsSignal(student, 5), ids)
    narrow = TopKSignal(torch.zeros(3), torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))
    with pytest.raises(ConfigError, match=r"loss\.top_k = 4 .* found 2"):
        _loss(student, narrow, ids)
    with pytest.raises(ValueError, match="all 7 columns of the vocabulary, found 1 of 6"):
        _loss(student, LogitsSignal(student, 7), ids, vocab_size=7)
